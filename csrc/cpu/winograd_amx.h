// The products of Winograd's convolution on matrix tiles: float32 in parts of bfloat16 (float_tiles.h). Terms are in blocks
// of 32, in which k and k + 16 are a pair; planes, map tiles and columns in tiles of 16, two of which are multiplied at once.
#pragma once
#include "nasdet/float_tiles.h"
#include "winograd_maps.h"

namespace nasdet::NASDET_ISA {
namespace {

// The parts of pairs of floats, `part_bytes` apart; past the caches only whole lines of them.
template <bool kStreaming = false>
NASDET_INLINE void store_pairs(Vector low, Vector high, char* to, int64_t part_bytes) {
  Vector even[kFloatParts], odd[kFloatParts];
  split(low, even), split(high, odd);
  for (int part = 0; part < kFloatParts; ++part) {
    const vec_u32 pairs = paired_halves(even[part], odd[part]);
    store_to<kStreaming && kBytes == 64>(reinterpret_cast<float*>(to + part * part_bytes), (Vector)pairs);
  }
}

// A row of floats as one of the first operand: those of `terms` that are there, zeros to the end of the block.
NASDET_INLINE void split_row(const float* from, int64_t terms, char* to, int64_t blocks, int64_t block_bytes) {
  for (int64_t b = 0; b < blocks; ++b, to += block_bytes)
    for (int64_t k = 0; k < kAmxSide; k += W) {
      const int64_t low = b * kAmxTerms + k, high = low + kAmxSide;
      store_pairs(low < terms ? load(from + low) : Vector{}, high < terms ? load(from + high) : Vector{}, to + k * 4,
                  kAmxTileBytes);
    }
}

// The weights of 16 columns and a block of terms, to the planes' tiles at `to`.
template <bool kStreaming = false>
void split_weights(const WinogradProduct& p, int64_t column, int64_t block, char* to, int64_t plane_bytes) {
  TermTaps terms[2];
  Vector values[2][kWinogradPlanes];
  for (int64_t lane = 0; lane < kAmxSide; lane += W) {
    const int64_t v = column * (kAmxSide / W) + lane / W;
    if (v >= p.wide.count) return;
    for (int64_t first = 0; first < kAmxSide; first += W) {
      const int64_t d = (block * kAmxTerms + first) / W;
      for (int half = 0; half < 2; ++half) {
        if (d + half * kAmxSide / W < p.deep.count) terms[half].load(p, v, d + half * kAmxSide / W);
        else terms[half] = {};
      }
      for (int64_t k = 0; k < W; ++k) {
        for (int half = 0; half < 2; ++half)
          transform_kernel(terms[half].taps + k * terms[half].term, terms[half].step,
                           [&](int plane, Vector value) { values[half][plane] = value; });
        char* row = to + (first + k) * kAmxRowBytes + lane * 4;
        for (int plane = 0; plane < kWinogradPlanes; ++plane, row += plane_bytes)
          store_pairs<kStreaming>(values[0][plane], values[1][plane], row, 2 * kAmxTileBytes);
      }
    }
  }
}

// A plane's operands and sums, the first of whose rows and columns are here, and memory that will be read next.
struct AmxOperands {
  const char *a, *b;
  float* sums;
  int64_t a_tile, b_panel;     // bytes from one tile of rows to the next, and from one panel of 32 columns to the next
  int64_t sum_row, sum_panel;  // floats
  const char* ahead;
  int64_t ahead_bytes;
};

template <int kRows, int kColumns>
NASDET_INLINE void multiply_tiles(AmxTiles& tiles, const char* a, int64_t a_tile, const char* b, int64_t blocks,
                                  float* sums, int64_t row, bool accumulate, const char* ahead, int64_t lines) {
  const int64_t stride = row * 4;
  float* const below = sums + kAmxSide * row;
  if (accumulate) {
    tiles.load<0>(sums, stride);
    if constexpr (kColumns == 2) tiles.load<1>(sums + kAmxSide, stride);
    if constexpr (kRows == 2) tiles.load<2>(below, stride);
    if constexpr (kRows == 2 && kColumns == 2) tiles.load<3>(below + kAmxSide, stride);
  } else {
    tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
  }
  for (int64_t block = 0; block < blocks; ++block, a += kAmxRowBlock, b += kAmxColumnBlock)
    add_float_products<kRows, kColumns>(tiles, {a, kAmxRowBytes, kAmxTileBytes, a_tile},
                                        {b, kAmxRowBytes, 2 * kAmxTileBytes, kAmxTileBytes}, [&] {
                                          for (int64_t i = 0; i < lines; ++i, ahead += kAmxRowBytes)
                                            __builtin_prefetch(ahead, 0, 2);
                                        });
  tiles.store<0>(sums, stride);
  if constexpr (kColumns == 2) tiles.store<1>(sums + kAmxSide, stride);
  if constexpr (kRows == 2) tiles.store<2>(below, stride);
  if constexpr (kRows == 2 && kColumns == 2) tiles.store<3>(below + kAmxSide, stride);
}

// Sums over `blocks` of terms for some tiles of rows and of columns.
NASDET_INLINE void multiply_tiles(AmxTiles& tiles, const AmxOperands& o, int64_t rows, int64_t columns, int64_t blocks,
                                  bool accumulate) {
  constexpr int64_t kProducts = 6;
  const int64_t parts = (rows + 1) / 2 * ((columns + 1) / 2) * blocks * kProducts;
  const int64_t lines = parts > 0 ? (o.ahead_bytes / kAmxRowBytes + parts - 1) / parts : 0;
  const char* ahead = o.ahead;
  for (int64_t column = 0; column < columns; column += 2)
    for (int64_t row = 0; row < rows; row += 2, ahead += lines * kProducts * blocks * kAmxRowBytes) {
      const char *const a = o.a + row * o.a_tile, *const b = o.b + column / 2 * o.b_panel;
      float* const sums = o.sums + row * kAmxSide * o.sum_row + column / 2 * o.sum_panel;
      const bool two_rows = row + 1 < rows, two_columns = column + 1 < columns;
      if (two_rows && two_columns)
        multiply_tiles<2, 2>(tiles, a, o.a_tile, b, blocks, sums, o.sum_row, accumulate, ahead, lines);
      else if (two_rows) multiply_tiles<2, 1>(tiles, a, o.a_tile, b, blocks, sums, o.sum_row, accumulate, ahead, lines);
      else if (two_columns)
        multiply_tiles<1, 2>(tiles, a, o.a_tile, b, blocks, sums, o.sum_row, accumulate, ahead, lines);
      else multiply_tiles<1, 1>(tiles, a, o.a_tile, b, blocks, sums, o.sum_row, accumulate, ahead, lines);
    }
}

// `count` map tiles from `first` on, with the weights of all columns: a plane's sums take the place of its inputs.
void amx_chunk(const WinogradAmx& job, int64_t first, int64_t count, char* scratch) {
  const WinogradProduct& p = job.product;
  char* const parts = scratch;
  float* const domain = reinterpret_cast<float*>(scratch + amx_tiles(count) * job.blocks * kAmxRowBlock);
  const int64_t deep = p.deep.count * W, wide = job.columns * kAmxSide, a_tile = job.blocks * kAmxRowBlock;
  const WinogradTile* const map_tiles = p.tiles + first;
  WinogradRows rows;
  rows.for_tiles(map_tiles, count, [&](const WinogradTile& tile, const WinogradRows& at) {
    transform_inputs(p, p.deep, tile, {domain, deep, p.deep_plane}, at);
  });
  AmxTiles tiles;
  for (int64_t plane = 0; plane < kWinogradPlanes; ++plane) {
    float* const values = domain + plane * p.deep_plane;
    for (int64_t i = 0; i < rows.of(plane); ++i)
      split_row(values + i * deep, deep, parts + i / kAmxSide * a_tile + i % kAmxSide * kAmxRowBytes, job.blocks,
                kAmxRowBlock);
    const char* const weights = job.weights + plane * job.weight_plane;
    const int64_t panel = job.blocks * kAmxColumnBlock;
    const AmxOperands operands{
        parts, weights, values, a_tile, panel, wide, 2 * kAmxSide, weights + panel, (job.columns + 1) / 2 * panel};
    multiply_tiles(tiles, operands, amx_tiles(rows.of(plane)), job.columns, job.blocks, false);
  }
  write_tiles(p, {0, p.wide.count}, map_tiles, count, {domain, wide, p.deep_plane});
}

// The parts of 16 map tiles, for all columns.
void amx_split_inputs(const WinogradAmx& job, int64_t index, char* scratch) {
  const WinogradProduct& p = job.product;
  const Domain domain{reinterpret_cast<float*>(scratch), p.deep.count * W, p.deep_plane};
  const int64_t first = index * kAmxSide;
  const int64_t count = job.tiles - first < kAmxSide ? job.tiles - first : kAmxSide;
  const int64_t plane_bytes = amx_tiles(job.tiles) * kAmxRowBlock;
  WinogradRows before, rows;
  before.add(p.tiles, first);
  rows.for_tiles(p.tiles + first, count, [&](const WinogradTile& tile, const WinogradRows& at) {
    transform_inputs(p, p.deep, tile, domain, at);
  });
  for (int64_t plane = 0; plane < kWinogradPlanes; ++plane)
    for (int64_t i = 0; i < rows.of(plane); ++i) {
      const int64_t row = before.of(plane) + i;
      split_row(domain.data + plane * domain.plane + i * domain.row, domain.row,
                job.inputs + plane * plane_bytes + row / kAmxSide * kAmxRowBlock + row % kAmxSide * kAmxRowBytes,
                job.blocks, kWinogradPlanes * plane_bytes);
    }
}

// `count` columns of 16 from `first` on, for all map tiles: a block's weights are made for one use.
void amx_columns(const WinogradAmx& job, int64_t first, int64_t count, char* scratch) {
  const WinogradProduct& p = job.product;
  float* const sums = reinterpret_cast<float*>(scratch + kWinogradPlanes * job.weight_plane);
  const int64_t plane_bytes = amx_tiles(job.tiles) * kAmxRowBlock, row = (count + 1) / 2 * 2 * kAmxSide;
  WinogradRows rows;
  rows.add(p.tiles, job.tiles);
  const char* inputs = job.inputs;
  AmxTiles tiles;
  for (int64_t block = 0; block < job.blocks; ++block) {
    for (int64_t column = 0; column < count; ++column)
      split_weights(p, first + column, block, scratch + column / 2 * kAmxColumnBlock + column % 2 * kAmxTileBytes,
                    job.weight_plane);
    for (int64_t plane = 0; plane < kWinogradPlanes; ++plane, inputs += plane_bytes) {
      const AmxOperands operands{inputs,
                                 scratch + plane * job.weight_plane,
                                 sums + plane * p.wide_plane,
                                 kAmxRowBlock,
                                 kAmxColumnBlock,
                                 row,
                                 2 * kAmxSide,
                                 inputs + plane_bytes,
                                 plane_bytes};
      multiply_tiles(tiles, operands, amx_tiles(rows.of(plane)), count, 1, block > 0);
    }
  }
  const int64_t vector = first * (kAmxSide / W), rest = p.wide.count - vector, most = count * (kAmxSide / W);
  write_tiles(p, {vector, rest < most ? rest : most}, p.tiles, job.tiles, {sums, row, p.wide_plane});
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
