// NHWC: lanes are channels, a column at a time, with the column taps that exist there.
#pragma once
#include "depthwise_conv2d_tiles.h"

namespace nasdet::NASDET_ISA {
namespace {

// Calls f(Int<vectors>, first channel, block) for blocks that cover channels [begin, end), at least one vector of them. The last
// one reaches back where a vector does not fit any more: its first channels come twice.
template <int L, class F> NASDET_INLINE void for_channels(int64_t begin, int64_t end, F&& f) {
  int64_t c = begin, block = 0;
  for (; c + kVectors * L <= end; c += kVectors * L) f(Int<kVectors>{}, c, block++);
  for (; c < end; c += L) f(Int<1>{}, c + L <= end ? c : end - L, block++);
}

template <class S> void convolve_pixels(const DepthwisePixels& p, const DepthwiseTile& tile, int64_t image, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  const int64_t C = p.from.channels, K = p.kernel;
  const S* const source = static_cast<const S*>(p.source) + image * p.from.height * p.from.width * C;
  Sources<S> sources;
  find_sources<S>(sources, tile, rows_are_shared<S>(tile), static_cast<const S*>(p.zeros), [&](int64_t i) { return source + i * p.from.width * C; });
  const DepthwiseAxis rows = *tile.axis;
  S* targets[kDepthwiseRows];
  for (int64_t r = 0; r < tile.rows; ++r)
    targets[r] = static_cast<S*>(p.target) + (image * p.to.height + rows.first + rows.step * (tile.first + r * tile.spacing)) * p.to.width * C;
  const T* const weights = static_cast<const T*>(p.weights);
  const bool streaming = p.streaming;
  with_tile<S>(tile, [&](auto taps_, auto step_, auto rows_) __attribute__((always_inline)) {
    constexpr int kTaps = decltype(taps_)::value, kStep = decltype(step_)::value, R = decltype(rows_)::value;
    const int64_t passes = kTaps > 1 ? 1 : rows.taps;
    for (int64_t lattice = 0; lattice < p.column_lattices; ++lattice) {
      const DepthwiseAxis a = p.columns[lattice];
      for (int64_t j = 0; j < a.count; ++j) {
        const int64_t at = (a.first + a.step * j) * C, first = a.begin[j], last = a.end[j];
        for_channels<L>(begin, end, [&](auto vectors_, int64_t c, int64_t) __attribute__((always_inline)) {
          constexpr int V = decltype(vectors_)::value;
          vec<T> sum[R][V] = {};
          for (int64_t m = 0; m < passes; ++m) {
            const int64_t down = kTaps > 1 ? 0 : rows.tap[m];
            for (int64_t l = first; l < last; ++l)
              add_products<kTaps, kStep, R, V, true>(sum, sources.rows + m * R, (a.advance * j + a.base[l]) * C + c, weights + (down * K + a.tap[l]) * C + c, K * C);
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) streaming ? store_streaming(targets[r] + at + c + v * L, sum[r][v]) : store(targets[r] + at + c + v * L, sum[r][v]);
        });
      }
    }
  });
  if (streaming) streaming_fence();
}

// Adds a tile's part of the weights' gradient for channels [begin, end) to sums[block][kernel * kernel][kVectors * L].
template <class S> void correlate_pixels(const DepthwiseGrad& p, const DepthwiseTile& tile, int64_t image, int64_t begin, int64_t end, arithmetic_t<S>* sums) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  const int64_t C = p.from.channels, K = p.kernel;
  const S* const source = static_cast<const S*>(p.source) + image * p.from.height * p.from.width * C;
  Sources<S> sources;
  find_sources<S>(sources, tile, rows_are_shared<S>(tile), static_cast<const S*>(p.zeros), [&](int64_t i) { return source + i * p.from.width * C; });
  const DepthwiseAxis rows = *tile.axis, a = *p.columns;
  const S* grads[kDepthwiseRows];
  for (int64_t r = 0; r < tile.rows; ++r) grads[r] = static_cast<const S*>(p.grad) + (image * p.to.height + tile.first + r * tile.spacing) * p.to.width * C;
  with_tile<S>(tile, [&](auto taps_, auto step_, auto rows_) __attribute__((always_inline)) {
    constexpr int kTaps = decltype(taps_)::value, kStep = decltype(step_)::value, R = decltype(rows_)::value;
    constexpr int kBlock = kVectors * L;
    const int64_t passes = kTaps > 1 ? 1 : rows.taps;
    for (int64_t j = 0; j < a.count; ++j) {
      const int64_t first = a.begin[j], last = a.end[j];
      for_channels<L>(begin, end, [&](auto vectors_, int64_t c, int64_t block) __attribute__((always_inline)) {
        constexpr int V = decltype(vectors_)::value;
        vec<T> grad[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) grad[r][v] = load(grads[r] + j * C + c + v * L);
        T* const own = sums + block * K * K * kBlock;
        for (int64_t m = 0; m < passes; ++m) {
          const int64_t down = kTaps > 1 ? 0 : rows.tap[m];
          for (int64_t l = first; l < last; ++l)
            add_correlations<kTaps, kStep, R, V, true>(own + (down * K + a.tap[l]) * kBlock, K * kBlock, grad, sources.rows + m * R, (a.advance * j + a.base[l]) * C + c);
        }
      });
    }
  });
}

// Moves a chunk's sums to double, [channels of the chunk][kernel * kernel], and clears them.
template <class T> void flush_pixels(int64_t kernel, int64_t begin, int64_t end, T* sums, double* total) {
  constexpr int L = kLanes<T>, kBlock = kVectors * L;
  const int64_t taps = kernel * kernel;
  int64_t done = begin;
  for_channels<L>(begin, end, [&](auto vectors_, int64_t c, int64_t block) {
    T* const own = sums + block * taps * kBlock;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t i = 0; i < decltype(vectors_)::value * L; ++i) {
        if (c + i >= done) total[(c + i - begin) * taps + t] += double(own[t * kBlock + i]);
        own[t * kBlock + i] = 0;
      }
    done = c + decltype(vectors_)::value * L;
  });
}

// The gradient of channels [begin, end) from tiles first..last of all images, numbered through.
template <class S> void grad_pixels(const DepthwiseGrad& p, int64_t first, int64_t last, int64_t begin, int64_t end, void* scratch, double* total) {
  using T = arithmetic_t<S>;
  constexpr int64_t kTerms = 1024;  // of a sum in the arithmetic's type
  T* const sums = static_cast<T*>(scratch);
  const int64_t blocks = (end - begin) / kLanes<T> + 2, count = blocks * p.kernel * p.kernel * kVectors * kLanes<T>;
  for (int64_t i = 0; i < count; ++i) sums[i] = 0;
  int64_t terms = 0;
  for (int64_t t = first; t < last; ++t) {
    const DepthwiseTile& tile = p.tiles[t % p.tile_count];
    terms += tile.rows * p.to.width;
    if (terms > kTerms) flush_pixels<T>(p.kernel, begin, end, sums, total), terms = tile.rows * p.to.width;
    correlate_pixels<S>(p, tile, t / p.tile_count, begin, end, sums);
  }
  flush_pixels<T>(p.kernel, begin, end, sums, total);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
