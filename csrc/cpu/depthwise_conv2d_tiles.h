// The innermost loops of the depthwise convolution: up to 7 rows at once, so that what is loaded serves several of them.
#pragma once
#include "depthwise_conv2d_jobs.h"
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kVectors = kBytes == 64 ? 2 : 1;  // side by side: what the registers hold beside 7 rows and 7 weights

// Sources of a tile's rows by tap: rows[tap * rows + r]; in the shared form rows[step * r + tap].
template <class S> struct Sources { const S* rows[kDepthwiseKernel * kDepthwiseRows]; };

// Holds `v` in a register. The compiler would rather load a source once per tap, as an operand of the product, and loads that
// straddle cache lines, as those of most numbers of channels do, then take longer than the products.
template <class V> NASDET_INLINE void in_register(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

// Adds the products of one column tap (all row taps when shared: kTaps > 1) to R x V vectors. `w` points at vectors (kLaneWeights) or
// at values, a row of the kernel `w_step` apart.
template <int kTaps, int kStep, int R, int V, bool kLaneWeights, class S>
NASDET_INLINE void add_products(vec<arithmetic_t<S>> (&sum)[R][V], const S* const* rows, int64_t offset, const arithmetic_t<S>* w, int64_t w_step) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  vec<T> weight[kTaps][V];
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) weight[k][v] = kLaneWeights ? load(w + k * w_step + v * L) : splat<T>(w[k * w_step]);
#pragma GCC unroll 19
  for (int j = 0; j < kTaps + kStep * (R - 1); ++j) {
    const S* const row = rows[j] + offset;
    vec<T> x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = load(row + v * L), in_register(x[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (j - kStep * r < 0 || j - kStep * r >= kTaps) continue;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += weight[j - kStep * r][v] * x[v];
    }
  }
}

// Adds <upstream rows, source rows> of one column tap to kTaps sums in memory, `step` apart.
template <int kTaps, int kStep, int R, int V, bool kLaneSums, class S>
NASDET_INLINE void add_correlations(arithmetic_t<S>* sums, int64_t step, const vec<arithmetic_t<S>> (&grad)[R][V], const S* const* rows, int64_t offset) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>, kSums = kLaneSums ? V : 1;
  vec<T> sum[kTaps][kSums];
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kSums; ++v) sum[k][v] = load(sums + k * step + v * L);
#pragma GCC unroll 19
  for (int j = 0; j < kTaps + kStep * (R - 1); ++j) {
    const S* const row = rows[j] + offset;
    vec<T> x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = load(row + v * L), in_register(x[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (j - kStep * r < 0 || j - kStep * r >= kTaps) continue;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[j - kStep * r][kLaneSums ? v : 0] += grad[r][v] * x[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < kSums; ++v) store(sums + k * step + v * L, sum[k][v]);
}

// Calls f with the number of taps that share rows, the step from row to row, and the number of rows, as constants.
template <int N> struct Int { static constexpr int value = N; };
template <int kTaps, int kStep, class F> NASDET_INLINE void with_rows(int64_t rows, F&& f) {
  switch (rows) {
    case 7: return f(Int<kTaps>{}, Int<kStep>{}, Int<7>{});
    case 4: return f(Int<kTaps>{}, Int<kStep>{}, Int<4>{});
    default: return f(Int<kTaps>{}, Int<1>{}, Int<1>{});
  }
}
template <int kStep, class F> NASDET_INLINE void with_taps(const DepthwiseTile& tile, F&& f) {
  switch (tile.axis->taps) {
    case 3: return with_rows<3, kStep>(tile.rows, f);
    case 5: return with_rows<5, kStep>(tile.rows, f);
    default: return with_rows<7, kStep>(tile.rows, f);
  }
}
// double and half have the plain form alone: the shared ones are much code.
template <class S> inline constexpr bool kHasShared = sizeof(S) == 4;
template <> inline constexpr bool kHasShared<BFloat16> = true;

template <class S> NASDET_INLINE bool rows_are_shared(const DepthwiseTile& tile) {
  return kHasShared<S> && tile.step > 0 && (tile.axis->taps == 3 || tile.axis->taps == 5 || tile.axis->taps == 7);
}
template <class S, class F> NASDET_INLINE void with_tile(const DepthwiseTile& tile, F&& f) {
  if constexpr (kHasShared<S>) {
    if (rows_are_shared<S>(tile)) return tile.step == 1 ? with_taps<1>(tile, f) : with_taps<2>(tile, f);
  }
  with_rows<1, 1>(tile.rows, f);
}

// Fills in the sources; row(i) is that of the source's row i.
template <class S, class Row> NASDET_INLINE void find_sources(Sources<S>& found, const DepthwiseTile& tile, bool shared, const S* zeros, Row&& row) {
  const DepthwiseAxis& a = *tile.axis;
  const auto of = [&](int64_t i) { return i >= 0 && i < a.source ? row(i) : zeros; };
  if (shared) {
    for (int64_t j = 0; j < a.taps + tile.step * (tile.rows - 1); ++j) found.rows[j] = of(tile.first * a.advance + a.base[0] + j * tile.unit);
    return;
  }
  for (int64_t t = 0; t < a.taps; ++t)
    for (int64_t r = 0; r < tile.rows; ++r) found.rows[t * tile.rows + r] = of((tile.first + r * tile.spacing) * a.advance + a.base[t]);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
