// The innermost loops of the depthwise convolution: up to 7 rows at once, so that what is loaded serves several of them.
#pragma once
#include "depthwise_conv2d_jobs.h"
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kVectors = kBytes == 64 ? 2 : 1;  // side by side: what the registers hold beside 7 rows and 7 weights

// Sources of a tile's rows by tap: rows[tap * rows + r]; in the shared form rows[step * r + tap].
template <class S> struct Sources { const S* rows[kDepthwiseKernel * kDepthwiseRows]; };

// Asks for `count` elements that are read or written some time later: maps have left the caches since they were last used.
template <class S> NASDET_INLINE void fetch(const S* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + i, 0, 2);
}

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

// Two vectors of one row: as they come, or of bfloat16 the even elements and the odd ones, which are cheaper to widen. What
// meets them, weights, sums and results, must have their order.
template <class S> inline constexpr bool kSplit = false;
template <> inline constexpr bool kSplit<BFloat16> = kVectors == 2;

template <int V, class S> NASDET_INLINE void load_row(const S* row, vec<arithmetic_t<S>> (&x)[V]) {
  if constexpr (V == 2 && kSplit<S>) {
    load_pair(row, x[0], x[1]);
  } else {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = load(row + v * kLanes<arithmetic_t<S>>);
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) in_register(x[v]);
}

// Where a lane's value stands in the row.
template <class S, int V> NASDET_INLINE int place_of(int lane) {
  constexpr int L = kLanes<arithmetic_t<S>>;
  return V == 2 && kSplit<S> ? 2 * (lane % L) + lane / L : lane;
}

// Consecutive values of the arithmetic's type in the order of load_row.
template <class S, int V> NASDET_INLINE void load_values(const arithmetic_t<S>* values, vec<arithmetic_t<S>> (&w)[V]) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) w[v] = load(values + v * L);
  if constexpr (V == 2 && kSplit<S>) {
    vec_i32 even;
    for (int i = 0; i < L; ++i) even[i] = 2 * i;
    const vec<T> first = w[0];
    w[0] = __builtin_shuffle(first, w[1], even);
    w[1] = __builtin_shuffle(first, w[1], even + 1);
  }
}

// The results of V vectors, in the order of load_row, as a row.
template <int V, class S> NASDET_INLINE void store_row(S* row, const vec<arithmetic_t<S>> (&sum)[V], bool streaming) {
  if constexpr (V == 2 && kSplit<S>) {
    const vec_u32 both = widened_words(narrow<S>(sum[0])) | (widened_words(narrow<S>(sum[1])) << 16);
    float* const words = reinterpret_cast<float*>(row);
    streaming ? store_streaming(words, (vec<float>)both) : store(words, (vec<float>)both);
  } else {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      streaming ? store_streaming(row + v * kLanes<arithmetic_t<S>>, sum[v])
                : store(row + v * kLanes<arithmetic_t<S>>, sum[v]);
  }
}

// Adds the products of one column tap (all row taps when shared: kTaps > 1) to R x V vectors. `w` points at vectors (kLaneWeights) or
// at values, a row of the kernel `w_step` apart.
template <int kTaps, int kStep, int R, int V, bool kLaneWeights, class S>
NASDET_INLINE void add_products(vec<arithmetic_t<S>> (&sum)[R][V], const S* const* rows, int64_t offset,
                                const arithmetic_t<S>* w, int64_t w_step) {
  using T = arithmetic_t<S>;
  vec<T> weight[kTaps][V];
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k) {
    if constexpr (kLaneWeights) {
      load_values<S, V>(w + k * w_step, weight[k]);
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) weight[k][v] = splat<T>(w[k * w_step]);
    }
  }
#pragma GCC unroll 19
  for (int j = 0; j < kTaps + kStep * (R - 1); ++j) {
    vec<T> x[V];
    load_row<V>(rows[j] + offset, x);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (j - kStep * r < 0 || j - kStep * r >= kTaps) continue;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += weight[j - kStep * r][v] * x[v];
    }
  }
}

// Upstream rows and source rows, and how far their columns are apart in memory.
template <class S, class G> struct Correlated {
  const G* const* grads;
  int64_t grad_step;
  const S* const* rows;
  int64_t row_step;
};

// Adds <upstream rows, source rows> of one column tap, over columns [first, last), to kTaps sums in memory, `step` apart.
template <int kTaps, int kStep, int R, int V, class S, class G>
NASDET_INLINE void add_correlations(arithmetic_t<S>* sums, int64_t step, const Correlated<S, G>& of,
                                    int64_t grad_offset, int64_t row_offset, int64_t first, int64_t last) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  vec<T> sum[kTaps][V];
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[k][v] = load(sums + k * step + v * L);
  for (int64_t j = first; j < last; ++j) {
    vec<T> grad[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) load_row<V>(of.grads[r] + grad_offset + j * of.grad_step, grad[r]);
#pragma GCC unroll 19
    for (int i = 0; i < kTaps + kStep * (R - 1); ++i) {
      vec<T> x[V];
      load_row<V>(of.rows[i] + row_offset + j * of.row_step, x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (i - kStep * r < 0 || i - kStep * r >= kTaps) continue;
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[i - kStep * r][v] += grad[r][v] * x[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(sums + k * step + v * L, sum[k][v]);
}

// Calls f with the number of taps that share rows, the step from row to row, and the number of rows, as constants.
template <int N> struct Int { static constexpr int value = N; };
template <int kTaps, int kStep, class F> NASDET_INLINE void with_rows(int64_t rows, F&& f) {
  switch (rows) {
    case 7:
      return f(Int<kTaps>{}, Int<kStep>{}, Int<7>{});
    case 4:
      return f(Int<kTaps>{}, Int<kStep>{}, Int<4>{});
    default:
      return f(Int<kTaps>{}, Int<1>{}, Int<1>{});
  }
}
template <int kStep, class F> NASDET_INLINE void with_taps(const DepthwiseTile& tile, F&& f) {
  switch (tile.axis->taps) {
    case 3:
      return with_rows<3, kStep>(tile.rows, f);
    case 5:
      return with_rows<5, kStep>(tile.rows, f);
    default:
      return with_rows<7, kStep>(tile.rows, f);
  }
}
// double and half have the plain form alone, and so has the baseline: the shared ones are much code.
template <class S> inline constexpr bool kHasShared = kBytes > 16 && sizeof(S) == 4;
template <> inline constexpr bool kHasShared<BFloat16> = kBytes > 16;

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
template <class S, class Row>
NASDET_INLINE void find_sources(Sources<S>& found, const DepthwiseTile& tile, bool shared, const S* zeros, Row&& row) {
  const DepthwiseAxis& a = *tile.axis;
  const auto of = [&](int64_t i) { return i >= 0 && i < a.source ? row(i) : zeros; };
  if (shared) {
    for (int64_t j = 0; j < a.taps + tile.step * (tile.rows - 1); ++j)
      found.rows[j] = of(tile.first * a.advance + a.base[0] + j * tile.unit);
    return;
  }
  for (int64_t t = 0; t < a.taps; ++t)
    for (int64_t r = 0; r < tile.rows; ++r)
      found.rows[t * tile.rows + r] = of((tile.first + r * tile.spacing) * a.advance + a.base[t]);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
