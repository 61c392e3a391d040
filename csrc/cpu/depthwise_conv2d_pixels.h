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
  if (kVectors > 1 && c + L < end && end - begin >= kVectors * L)
    f(Int<kVectors>{}, end - kVectors * L, block++), c = end;
  for (; c < end; c += L) f(Int<1>{}, c + L <= end ? c : end - L, block++);
}

template <class S>
void convolve_pixels(const DepthwisePixels& p, const DepthwiseTile& tile, int64_t image, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  const int64_t C = p.from.channels, K = p.kernel;
  const S* const source = static_cast<const S*>(p.source) + image * p.from.height * p.from.width * C;
  Sources<S> sources;
  find_sources<S>(sources, tile, rows_are_shared<S>(tile), static_cast<const S*>(p.zeros),
                  [&](int64_t i) { return source + i * p.from.width * C; });
  const DepthwiseAxis rows = *tile.axis;
  S* targets[kDepthwiseRows];
  for (int64_t r = 0; r < tile.rows; ++r)
    targets[r] = static_cast<S*>(p.target) +
                 (image * p.to.height + rows.first + rows.step * (tile.first + r * tile.spacing)) * p.to.width * C;
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
              add_products<kTaps, kStep, R, V, true>(sum, sources.rows + m * R, (a.advance * j + a.base[l]) * C + c,
                                                     weights + (down * K + a.tap[l]) * C + c, K * C);
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) store_row<V>(targets[r] + at + c, sum[r], streaming);
        });
      }
    }
  });
  if (streaming) streaming_fence();
}

constexpr int64_t kColumns = 8;  // of both maps' rows that the innermost cache holds for a block of channels

// Adds a tile's part of the weights' gradient for channels [begin, end) to sums[block][kernel * kernel][kVectors * L].
template <class S>
void correlate_pixels(const DepthwiseGrad& p, const DepthwiseTile& tile, int64_t image, int64_t begin, int64_t end,
                      arithmetic_t<S>* sums) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  const int64_t C = p.from.channels, K = p.kernel;
  const S* const source = static_cast<const S*>(p.source) + image * p.from.height * p.from.width * C;
  Sources<S> sources;
  find_sources<S>(sources, tile, rows_are_shared<S>(tile), static_cast<const S*>(p.zeros),
                  [&](int64_t i) { return source + i * p.from.width * C; });
  const DepthwiseAxis rows = *tile.axis, a = *p.columns;
  const S* grads[kDepthwiseRows];
  for (int64_t r = 0; r < tile.rows; ++r)
    grads[r] = static_cast<const S*>(p.grad) + (image * p.to.height + tile.first + r * tile.spacing) * p.to.width * C;
  with_tile<S>(tile, [&](auto taps_, auto step_, auto rows_) __attribute__((always_inline)) {
    constexpr int kTaps = decltype(taps_)::value, kStep = decltype(step_)::value, R = decltype(rows_)::value;
    constexpr int kBlock = kVectors * L;
    const int64_t passes = kTaps > 1 ? 1 : rows.taps;
    const int64_t columns = a.advance == 1 ? kColumns : kColumns / 2;
    for (int64_t j = 0; j < a.count; j += columns) {
      const int64_t stop = j + columns < a.count ? j + columns : a.count;
      for_channels<L>(begin, end, [&](auto vectors_, int64_t c, int64_t block) __attribute__((always_inline)) {
        constexpr int V = decltype(vectors_)::value;
        T* const own = sums + block * K * K * kBlock;
        for (int64_t m = 0; m < passes; ++m) {
          const int64_t down = kTaps > 1 ? 0 : rows.tap[m];
          const Correlated<S, S> of{grads, C, sources.rows + m * R, a.advance * C};
          for (int64_t l = 0; l < a.taps; ++l) {
            const int64_t first = a.first_of(l), last = a.last_of(l);
            add_correlations<kTaps, kStep, R, V>(own + (down * K + a.tap[l]) * kBlock, K * kBlock, of, c,
                                                 a.base[l] * C + c, first > j ? first : j, last < stop ? last : stop);
          }
        }
      });
    }
  });
}

// Moves a chunk's sums to double, [channels of the chunk][kernel * kernel], and clears them.
template <class S> void flush_pixels(int64_t kernel, int64_t begin, int64_t end, arithmetic_t<S>* sums, double* total) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>, kBlock = kVectors * L;
  const int64_t taps = kernel * kernel;
  int64_t done = begin;
  for_channels<L>(begin, end, [&](auto vectors_, int64_t c, int64_t block) {
    constexpr int V = decltype(vectors_)::value;
    T* const own = sums + block * taps * kBlock;
    for (int64_t t = 0; t < taps; ++t)
      for (int i = 0; i < V * L; ++i) {
        const int64_t channel = c + place_of<S, V>(i);
        if (channel >= done) total[(channel - begin) * taps + t] += double(own[t * kBlock + i]);
        own[t * kBlock + i] = 0;
      }
    done = c + V * L;
  });
}

// The gradient of channels [begin, end) from tiles first..last of all images, numbered through.
template <class S>
void grad_pixels(const DepthwiseGrad& p, int64_t first, int64_t last, int64_t begin, int64_t end, void* scratch,
                 double* total) {
  using T = arithmetic_t<S>;
  constexpr int64_t kTerms = 1024;  // of a sum in the arithmetic's type
  T* const sums = static_cast<T*>(scratch);
  const int64_t blocks = (end - begin) / kLanes<T> + 2, count = blocks * p.kernel * p.kernel * kVectors * kLanes<T>;
  for (int64_t i = 0; i < count; ++i) sums[i] = 0;
  int64_t terms = 0;
  for (int64_t t = first; t < last; ++t) {
    const DepthwiseTile& tile = p.tiles[t % p.tile_count];
    terms += tile.rows * p.to.width;
    if (terms > kTerms) flush_pixels<S>(p.kernel, begin, end, sums, total), terms = tile.rows * p.to.width;
    correlate_pixels<S>(p, tile, t / p.tile_count, begin, end, sums);
  }
  flush_pixels<S>(p.kernel, begin, end, sums, total);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
