// The gradient of Winograd's weights on matrix tiles: its terms are map tiles, 32 to a block, in which t and t + 16 are a pair.
#pragma once
#include "winograd_amx.h"

namespace nasdet::NASDET_ISA {
namespace {

// The parts of a pair of terms of W channels; terms that are not there are zeros.
NASDET_INLINE void split_pair(const float* from, int64_t row, int64_t pair, int64_t terms, char* to,
                              int64_t part_bytes) {
  const int64_t other = pair + kAmxSide;
  store_pairs(pair < terms ? load(from + pair * row) : Vector{}, other < terms ? load(from + other * row) : Vector{},
              to, part_bytes);
}

// A block's 16 channels as the second operand's columns.
NASDET_INLINE void split_columns(const float* from, int64_t row, int64_t terms, char* to) {
  for (int64_t c = 0; c < kAmxSide; c += W)
    for (int64_t pair = 0; pair < kAmxSide; ++pair)
      split_pair(from + c, row, pair, terms, to + pair * kAmxRowBytes + c * 4, 2 * kAmxTileBytes);
}

// A block's 16 channels as the first operand's rows.
NASDET_INLINE void split_rows(const float* from, int64_t row, int64_t terms, char* to) {
  for (int64_t c = 0; c < kAmxSide; c += W)
    for (int64_t first = 0; first < kAmxSide; first += W) {
      Vector squares[kFloatParts][W];
      for (int64_t i = 0; i < W; ++i)
        split_pair(from + c, row, first + i, terms, reinterpret_cast<char*>(&squares[0][i]), sizeof squares[0]);
      for (int part = 0; part < kFloatParts; ++part) {
        transpose(squares[part]);
        for (int64_t i = 0; i < W; ++i)
          store(reinterpret_cast<float*>(to + part * kAmxTileBytes + (c + i) * kAmxRowBytes + first * 4),
                squares[part][i]);
      }
    }
}

// Whether some tile of a block is in the plane.
NASDET_INLINE bool any_in_plane(const WinogradGradient& g, int64_t first, int64_t plane) {
  for (int64_t i = first; i < first + kAmxTerms && i < g.tile_count; ++i)
    if (g.tiles[i].has(plane)) return true;
  return false;
}

// A plane's sums over the map tiles; `scratch` takes the parts of both sides.
void amx_gradient_plane(const WinogradGradient& g, int64_t plane, char* scratch) {
  const int64_t rows = amx_tiles(g.ins);
  const int64_t columns = amx_tiles(g.y.count * W);
  const int64_t most_blocks = (g.tile_count + kAmxTerms - 1) / kAmxTerms;
  const int64_t a_tile = most_blocks * kAmxRowBlock, b_panel = most_blocks * kAmxColumnBlock, panel = 2 * kAmxSide;
  char* const second = scratch + rows * a_tile;
  const float *const x = g.x_tiles + plane * g.x_plane, *const y = g.y_tiles + plane * g.y_plane;
  int64_t blocks = 0;
  for (int64_t first = 0; first < g.tile_count; first += kAmxTerms) {
    if (!any_in_plane(g, first, plane)) continue;
    const int64_t terms = g.tile_count - first;
    for (int64_t i = 0; i < rows; ++i)
      split_rows(x + first * g.x_row + i * kAmxSide, g.x_row, terms, scratch + i * a_tile + blocks * kAmxRowBlock);
    for (int64_t i = 0; i < columns; ++i)
      split_columns(y + first * g.y_row + i * kAmxSide, g.y_row, terms,
                    second + i / 2 * b_panel + i % 2 * kAmxTileBytes + blocks * kAmxColumnBlock);
    ++blocks;
  }
  float* const sums = g.sums + plane * g.sum_plane;
  AmxTiles tiles;
  const AmxOperands operands{scratch,
                             second,
                             sums,
                             a_tile,
                             b_panel,
                             panel,
                             g.sum_rows * panel,
                             reinterpret_cast<const char*>(sums + g.sum_plane),
                             rows * columns * kAmxTileBytes};
  multiply_tiles(tiles, operands, rows, columns, blocks, g.accumulate);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
