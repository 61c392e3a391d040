// The direct convolution on matrix tiles: blocks of positions by a panel of channels stay in tiles over all terms.
#pragma once
#include "conv_amx_copy.h"
#include "nasdet/amx.h"

namespace nasdet::NASDET_ISA {
namespace {

// sums[position][lane] for 32 positions and 16 * kPanelTiles lanes.
template <int kPanelTiles>
NASDET_INLINE void sum_terms(AmxTiles& tiles, const char* source, const int64_t* terms, int64_t count,
                             const char* weights, float* sums) {
  constexpr int64_t kStride = kPanelTiles * kAmxRowBytes;
  tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
  for (int64_t t = 0; t < count; ++t, weights += kAmxSide * kStride) {
    const char* const positions = source + terms[t];
    tiles.load<4>(positions, kAmxRowBytes);
    tiles.load<6>(weights, kStride);
    tiles.multiply<0, 4, 6>();
    if constexpr (kPanelTiles == 2) tiles.load<7>(weights + kAmxRowBytes, kStride), tiles.multiply<1, 4, 7>();
    tiles.load<5>(positions + kAmxTileBytes, kAmxRowBytes);
    tiles.multiply<2, 5, 6>();
    if constexpr (kPanelTiles == 2) tiles.multiply<3, 5, 7>();
  }
  float* const second = sums + kAmxSide * kPanelTiles * kAmxSide;
  tiles.store<0>(sums, kStride), tiles.store<2>(second, kStride);
  if constexpr (kPanelTiles == 2) tiles.store<1>(sums + kAmxSide, kStride), tiles.store<3>(second + kAmxSide, kStride);
}

// The same for 64 positions and 16 lanes: half the weights are read for a product, and those come from further away.
NASDET_INLINE void sum_long_terms(AmxTiles& tiles, const char* source, const int64_t* terms, int64_t count,
                                  const char* weights, float* sums) {
  constexpr int64_t kFloats = kAmxSide * kAmxSide;
  tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
  for (int64_t t = 0; t < count; ++t, weights += kAmxTileBytes) {
    const char* const positions = source + terms[t];
    tiles.load<6>(weights, kAmxRowBytes);
    tiles.load<4>(positions, kAmxRowBytes), tiles.multiply<0, 4, 6>();
    tiles.load<5>(positions + kAmxTileBytes, kAmxRowBytes), tiles.multiply<1, 5, 6>();
    tiles.load<7>(positions + 2 * kAmxTileBytes, kAmxRowBytes), tiles.multiply<2, 7, 6>();
    tiles.load<4>(positions + 3 * kAmxTileBytes, kAmxRowBytes), tiles.multiply<3, 4, 6>();
  }
  tiles.store<0>(sums, kAmxRowBytes), tiles.store<1>(sums + kFloats, kAmxRowBytes);
  tiles.store<2>(sums + 2 * kFloats, kAmxRowBytes), tiles.store<3>(sums + 3 * kFloats, kAmxRowBytes);
}

// Rounds the sums of positions from `position` on into those that are pixels.
inline void round_block(const TileSums& job, int64_t image, int64_t position, const ConvPanel& panel, const float* sums,
                        int64_t width) {
  constexpr int W = kLanes<float>;
  const ConvLattice& l = job.lattice;
  int64_t row = position / job.pitch, column = position % job.pitch;
  for (int i = 0; i < kTilePositions && row < job.rows; ++i, sums += width) {
    if (column < l.columns) {
      const int64_t line =
          (job.first_image + image) * job.target.height + l.first_row + (job.first_row + row) * l.step_h;
      BFloat16* const to = static_cast<BFloat16*>(const_cast<void*>(job.target.data)) +
                           (line * job.target.width + l.first_column + column * l.step_w) * job.target.channels +
                           panel.target;
      for (int64_t lane = 0; lane < panel.width; lane += W) {
        if (panel.width - lane >= W) store(to + lane, load(sums + lane));
        else store_part(to + lane, load_part(sums + lane, panel.width - lane), panel.width - lane);
      }
    }
    if (++column == job.pitch) column = 0, ++row;
  }
}

inline void tile_sums(const TileSums& job, const ConvPanel& panel, const char* source, int64_t image,
                      int64_t first_block, int64_t last_block) {
  AmxTiles tiles;
  alignas(64) float sums[kTilePositions * 2 * kAmxSide];
  const int64_t width = panel.width > kAmxSide ? 2 * kAmxSide : kAmxSide;
  const char* const weights = static_cast<const char*>(panel.weights);
  for (int64_t block = first_block, step; block < last_block; block += step) {
    const char* const from = source + block * kTilePositions * kAmxRowBytes;
    step = width == kAmxSide && block + 1 < last_block ? 2 : 1;
    if (step == 2) sum_long_terms(tiles, from, job.terms, job.term_count, weights, sums);
    else if (width == kAmxSide) sum_terms<1>(tiles, from, job.terms, job.term_count, weights, sums);
    else sum_terms<2>(tiles, from, job.terms, job.term_count, weights, sums);
    for (int64_t i = 0; i < step; ++i)
      round_block(job, image, (block + i) * kTilePositions, panel, sums + i * kTilePositions * width, width);
  }
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
