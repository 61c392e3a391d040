// The gradient of the weights on matrix tiles: output gradients by input positions, summed over chunks of rows in tiles.
#pragma once
#include "conv_amx_copy.h"
#include "nasdet/amx.h"

namespace nasdet::NASDET_ISA {
namespace {

// sums[channel][input channel] += sum over positions: 16 * kPanelTiles by 32 of them.
template <int kPanelTiles>
NASDET_INLINE void grad_chunk(AmxTiles& tiles, const char* grad, int64_t next_tile, const char* pairs,
                              int64_t next_half, int64_t steps, float* sums, bool fresh) {
  constexpr int64_t kStride = 2 * kAmxRowBytes;
  float* const second = sums + kAmxSide * 2 * kAmxSide;
  if (fresh) {
    tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
  } else {
    tiles.load<0>(sums, kStride), tiles.load<1>(sums + kAmxSide, kStride);
    if constexpr (kPanelTiles == 2) tiles.load<2>(second, kStride), tiles.load<3>(second + kAmxSide, kStride);
  }
  for (int64_t k = 0; k < steps; ++k, grad += kAmxTileBytes, pairs += kAmxTileBytes) {
    tiles.load<4>(grad, kAmxRowBytes);
    tiles.load<6>(pairs, kAmxRowBytes);
    tiles.multiply<0, 4, 6>();
    tiles.load<7>(pairs + next_half, kAmxRowBytes);
    tiles.multiply<1, 4, 7>();
    if constexpr (kPanelTiles == 2) {
      tiles.load<5>(grad + next_tile, kAmxRowBytes);
      tiles.multiply<2, 5, 6>(), tiles.multiply<3, 5, 7>();
    }
  }
  tiles.store<0>(sums, kStride), tiles.store<1>(sums + kAmxSide, kStride);
  if constexpr (kPanelTiles == 2) tiles.store<2>(second, kStride), tiles.store<3>(second + kAmxSide, kStride);
}

inline void tile_grad(const TileGrad& job) {
  AmxTiles tiles;
  const TileCopy& copy = *job.copy;
  const TileChunks& chunks = *job.chunks;
  const bool wide = chunks.panels[job.panel].width > kAmxSide;
  const int64_t half_bytes = copy.block_bytes() / 2, tap_floats = (wide ? 2 : 1) * kAmxSide * 2 * kAmxSide;
  for (int64_t chunk = 0; chunk < chunks.images * chunks.of_image(); ++chunk) {
    const int64_t image = chunk / chunks.of_image(), row = chunk % chunks.of_image() * chunks.chunk_rows;
    const int64_t positions = (at_most(chunks.chunk_rows, chunks.rows - row) - 1) * chunks.pitch + chunks.target.width;
    const int64_t steps = (positions + kTilePositions - 1) / kTilePositions;
    const char* const grad = chunks.data + (chunk * chunks.panel_count + job.panel) * 2 * chunks.steps * kAmxTileBytes;
    for (int64_t tap = job.first_tap; tap < job.last_tap; ++tap) {
      const int64_t from = image * copy.planes() * copy.positions + job.taps[tap] + row * chunks.pitch;
      const char* const pairs = job.pairs + (job.block * 4 + from % 2) * half_bytes + from / 2 * kAmxRowBytes;
      float* const sums = job.sums + tap * tap_floats;
      const bool fresh = job.first && chunk == 0;
      if (wide) grad_chunk<2>(tiles, grad, chunks.steps * kAmxTileBytes, pairs, 2 * half_bytes, steps, sums, fresh);
      else grad_chunk<1>(tiles, grad, 0, pairs, 2 * half_bytes, steps, sums, fresh);
    }
  }
}

// Sums in their own place from [tap][channel][32] to [tap][input channel of `channels`][channel].
inline void turn_sums(float* sums, int64_t taps, int64_t width, int64_t channels) {
  constexpr int W = kLanes<float>;
  alignas(64) float tap[2 * kAmxSide * kAmxTerms];
  float* to = sums;
  for (int64_t t = 0; t < taps; ++t, to += channels * width) {
    __builtin_memcpy(tap, sums + t * width * kAmxTerms, size_t(width * kAmxTerms) * sizeof(float));
    for (int64_t c = 0; c < channels; c += W)
      for (int64_t lane = 0; lane < width; lane += W) {
        vec<float> v[W];
        load_transposed(tap + lane * kAmxTerms + c, kAmxTerms, W, W, v);
        for (int64_t j = 0; j < at_most(W, channels - c); ++j) store(to + (c + j) * width + lane, v[j]);
      }
  }
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
