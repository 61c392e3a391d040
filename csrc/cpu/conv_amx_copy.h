// Maps into the layouts that matrix tiles are loaded from.
#pragma once
#include "conv_amx_jobs.h"
#include "conv_direct_weights.h"
#include "nasdet/amx.h"

namespace nasdet::NASDET_ISA {
namespace {

struct FiniteCheck {  // remembers whether an exponent was that of infinity or NaN
  vec_u32 seen = {};
  void see(vec<float> v) { seen |= (vec_u32)(((vec_u32)v & 0x7f800000u) == 0x7f800000u); }
  bool all() const {
    uint32_t any = 0;
    for (int i = 0; i < kLanes<float>; ++i) any |= seen[i];
    return any == 0;
  }
};

// `count` of up to 32 channels as they are, and zeros.
NASDET_INLINE void copy_channels(const BFloat16* from, BFloat16* to, int64_t count, FiniteCheck& finite) {
  constexpr int W = 2 * kLanes<float>;
  BFloat16 part[kAmxTerms] = {};
  if (count < kAmxTerms) {
    for (int64_t i = 0; i < count; ++i) part[i] = from[i];
    from = part;
  }
  for (int64_t i = 0; i < kAmxTerms; i += W) {
    vec_u32 both;
    __builtin_memcpy(&both, from + i, sizeof both);
    __builtin_memcpy(to + i, &both, sizeof both);
    finite.see((vec<float>)both), finite.see((vec<float>)(both << 16));
  }
}

// One row of one plane of one image, in that order, for all blocks. Whether all of it is finite.
inline bool copy_row(const TileCopy& job, int64_t index) {
  const int64_t row = index % job.rows;
  const int64_t plane = index / job.rows % job.planes();
  const int64_t image = index / job.rows / job.planes();
  const int64_t down = (job.first_row + row) * job.step_h + plane / job.step_w, across = plane % job.step_w;
  const bool inside = down >= 0 && down < job.source.height;
  const int64_t columns =
      inside && across < job.source.width ? (job.source.width - across + job.step_w - 1) / job.step_w : 0;
  const int64_t line =
      (((job.first_image + image) * job.source.height + down) * job.source.width + across) * job.source.channels;
  FiniteCheck finite;
  for (int64_t b = 0; b < job.block_count; ++b) {
    char* const begin = job.data + b * job.block_bytes() + (image * job.planes() + plane) * job.plane_bytes();
    char* to = begin + (job.lead + row * job.pitch) * kAmxRowBytes;
    if (row == 0) __builtin_memset(begin, 0, size_t(job.lead * kAmxRowBytes));
    const BFloat16* from = static_cast<const BFloat16*>(job.source.data) + (columns ? line + job.blocks[b].channel : 0);
    for (int64_t i = 0; i < columns; ++i, to += kAmxRowBytes, from += job.step_w * job.source.channels)
      copy_channels(from, reinterpret_cast<BFloat16*>(to), job.blocks[b].count, finite);
    char* const end = row == job.rows - 1 ? begin + job.plane_bytes() : to + (job.pitch - columns) * kAmxRowBytes;
    __builtin_memset(to, 0, size_t(end - to));
  }
  return finite.all();
}

// A plane of a block as rows of two positions, those that begin at an even one and those that begin at an odd one.
inline void pair_plane(const TileCopy& job, char* pairs, int64_t index) {
  constexpr int W = kLanes<float>;
  const int64_t per_block = job.most_images * job.planes(), block = index / per_block;
  const BFloat16* const from = reinterpret_cast<const BFloat16*>(job.data + index * job.plane_bytes());
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t parity = 0; parity < 2; ++parity) {
      float* to = reinterpret_cast<float*>(pairs + (block * 4 + half * 2 + parity) * job.block_bytes() / 2 +
                                           index % per_block * job.plane_bytes() / 2);
      for (int64_t position = parity; position < job.positions + parity; position += 2, to += kAmxSide)
        for (int64_t lane = 0; lane < kAmxSide; lane += W) {
          const BFloat16* const even = from + position * kAmxTerms + half * kAmxSide + lane;
          store(to + lane, (vec<float>)paired_halves(
                               load(even), position + 1 < job.positions ? load(even + kAmxTerms) : vec<float>{}));
        }
    }
}

// A tile of 16 channels (of which `count` are there) by 32 positions, from pointers to the pixels or to zeros.
inline void turn_tile(const BFloat16* const* pixel, int64_t channel, int64_t count, float* tile, FiniteCheck& finite) {
  constexpr int W = kLanes<float>;
  for (int64_t lane = 0; lane < kAmxSide; lane += W)
    for (int64_t pair = 0; pair < kAmxSide; pair += W) {
      vec<float> v[W] = {};
      for (int i = 0; i < W && lane < count; ++i) {
        const vec<float> even = load_up_to(pixel[2 * (pair + i)] + channel + lane, count - lane);
        const vec<float> odd = load_up_to(pixel[2 * (pair + i) + 1] + channel + lane, count - lane);
        finite.see(even), finite.see(odd);
        v[i] = (vec<float>)paired_halves(even, odd);
      }
      transpose<float>(v);
      for (int i = 0; i < W; ++i) store(tile + (lane + i) * kAmxSide + pair, v[i]);
    }
}

// One chunk of the gradient, for all panels. Whether all of it is finite.
inline bool turn_chunk(const TileChunks& job, const void* zeros, int64_t chunk) {
  const int64_t image = chunk / job.of_image();
  const int64_t first = chunk % job.of_image() * job.chunk_rows;
  const int64_t rows = at_most(job.chunk_rows, job.rows - first);
  const BFloat16* const line =
      static_cast<const BFloat16*>(job.target.data) +
      ((job.first_image + image) * job.target.height + job.first_row + first) * job.target.width * job.target.channels;
  float* const to = reinterpret_cast<float*>(job.data + chunk * job.panel_count * 2 * job.steps * kAmxTileBytes);
  FiniteCheck finite;
  int64_t row = 0, column = 0;
  for (int64_t step = 0; step < job.steps; ++step) {
    const BFloat16* pixel[kTilePositions];
    for (int i = 0; i < kTilePositions; ++i) {
      pixel[i] = row < rows && column < job.target.width
                     ? line + (row * job.target.width + column) * job.target.channels
                     : static_cast<const BFloat16*>(zeros);
      if (++column == job.pitch) column = 0, ++row;
    }
    for (int64_t t = 0; t < 2 * job.panel_count; ++t) {
      const ConvPanel& panel = job.panels[t / 2];
      const int64_t lane = t % 2 * kAmxSide;
      if (lane < panel.width)
        turn_tile(pixel, panel.target + lane, at_most(kAmxSide, panel.width - lane),
                  to + (t * job.steps + step) * (kAmxTileBytes / 4), finite);
    }
  }
  return finite.all();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
