// norm_act_mix on NHWC maps: groups interleave, so a map is measured in one sweep and used in a second one.
#pragma once
#include "norm_act_mix_common.h"

namespace nasdet::NASDET_ISA {
namespace {

struct Block { int64_t offset, pixels; };  // elements from the tensor's start; pixels of this block

NASDET_INLINE Block block_of(const NormActMixArgs& a, int64_t image, int64_t block) {
  const int64_t first = block * kPixelBlock, left = a.pixels - first;
  return {(image * a.pixels + first) * a.channels, left < kPixelBlock ? left : kPixelBlock};
}

// Calls body(columns, c, n) over the channels: `columns` whole vectors at a time, and at last one part of n channels.
template <int kValue> struct Columns { static constexpr int value = kValue; };
template <int kMost, int W, class Body> NASDET_INLINE void over_channels(int64_t channels, Body&& body) {
  int64_t c = 0;
  for (; c + kMost * W <= channels; c += kMost * W) body(Columns<kMost>{}, c, int64_t(W));
  for (; c + W <= channels; c += W) body(Columns<1>{}, c, int64_t(W));
  if (c < channels) body(Columns<0>{}, c, channels - c);
}
template <int kColumns> inline constexpr int kVectors = kColumns ? kColumns : 1;
template <int kColumns, class S> NASDET_INLINE vec<arithmetic_t<S>> load_column(const S* p, int64_t n) {
  if constexpr (kColumns) return load(p);
  else return load_part(p, n);
}
template <int kColumns, class S> NASDET_INLINE void store_column(S* p, vec<arithmetic_t<S>> v, int64_t n) {
  if constexpr (kColumns) store(p, v);
  else store_part(p, v, n);
}

// Rows of per-channel numbers in the caller's scratch.
template <class T> struct Rows {
  T* base;
  int64_t channels;
  NASDET_INLINE T* operator[](int64_t row) const { return base + row * channels; }
};

template <class S>
void pixels_moments(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, Moments* per_group,
                    void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>, kRows = 32;  // rows that stay in L1 between their two sweeps
  const Block at = block_of(a, image, block);
  const S* x = static_cast<const S*>(a.xs[map]) + at.offset;
  const Rows<T> rows{static_cast<T*>(scratch), a.channels};  // means, squares
  for (int64_t first = 0; first < at.pixels; first += kRows) {
    const int64_t count = at.pixels - first < kRows ? at.pixels - first : kRows, total = first + count;
    const vec<T> share = splat<T>(T(count) / T(total)), spread = splat<T>(T(first) * T(count) / T(total)),
                 inverse = splat<T>(T(1) / T(count));
    over_channels<8, W>(a.channels, [&](auto columns, int64_t c, int64_t n) __attribute__((always_inline)) {
      constexpr int K = decltype(columns)::value, V = kVectors<K>;
      const S* from = x + first * a.channels + c;
      vec<T> mean[V] = {}, square[V] = {};
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v < V; ++v) mean[v] += load_column<K>(from + r * a.channels + v * W, n);
      for (int v = 0; v < V; ++v) mean[v] *= inverse;
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v < V; ++v) {
          const vec<T> d = load_column<K>(from + r * a.channels + v * W, n) - mean[v];
          square[v] += d * d;
        }
      for (int v = 0; v < V; ++v) {
        T *means = rows[0] + c + v * W, *squares = rows[1] + c + v * W;
        if (first) {
          const vec<T> before = load_column<K>(means, n), delta = mean[v] - before;
          mean[v] = before + delta * share;
          square[v] += load_column<K>(squares, n) + delta * delta * spread;
        }
        store_column<K>(means, mean[v], n);
        store_column<K>(squares, square[v], n);
      }
    });
  }
  const int64_t width = a.channels / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    per_group[g] = {0, 0, 0};
    for (int64_t c = g * width; c < (g + 1) * width; ++c)
      merge(per_group[g], {double(at.pixels), double(rows[0][c]), double(rows[1][c])});
  }
}

template <class S> void pixels_forward(const NormActMixArgs& a, int64_t image, int64_t block, void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const Rows<T> rows{static_cast<T*>(scratch), a.channels};  // mean, scale and shift of every map
  for (int64_t p = 0; p < a.maps; ++p)
    for (int64_t c = 0; c < a.channels; ++c) {
      const Channel<T> ch = channel_of<T>(a, p, image, c);
      rows[3 * p][c] = ch.mean, rows[3 * p + 1][c] = ch.scale, rows[3 * p + 2][c] = ch.shift;
    }
  const Block at = block_of(a, image, block);
  const T* w = static_cast<const T*>(a.weights);
  S* out = static_cast<S*>(a.out) + at.offset;
  const bool stream = a.streaming && a.channels % W == 0;
  for (int64_t r = 0; r < at.pixels; ++r)
    over_channels<2, W>(a.channels, [&](auto columns, int64_t c, int64_t n) __attribute__((always_inline)) {
      constexpr int K = decltype(columns)::value, V = kVectors<K>;
      const int64_t i = r * a.channels + c;
      vec<T> sum[V] = {};
      for (int64_t p = 0; p < a.maps; ++p) {
        const S* x = static_cast<const S*>(a.xs[p]) + at.offset + i;
        const T *mean = rows[3 * p] + c, *scale = rows[3 * p + 1] + c, *shift = rows[3 * p + 2] + c;
        for (int v = 0; v < V; ++v) {
          const vec<T> centered = load_column<K>(x + v * W, n) - load_column<K>(mean + v * W, n);
          const vec<T> z = load_column<K>(scale + v * W, n) * centered + load_column<K>(shift + v * W, n);
          sum[v] += splat<T>(w[p]) * maximum<T>(z, vec<T>{});
        }
      }
      for (int v = 0; v < V; ++v) {
        if (K && stream) store_streaming(out + i + v * W, sum[v]);
        else store_column<K>(out + i + v * W, sum[v], n);
      }
    });
  if (stream) streaming_fence();
}

template <class S>
void pixels_sums(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, double* sum_a, double* sum_b,
                 void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const Rows<T> rows{static_cast<T*>(scratch), a.channels};  // mean, scale, shift, rstd
  for (int64_t c = 0; c < a.channels; ++c) {
    const Channel<T> ch = channel_of<T>(a, map, image, c);
    rows[0][c] = ch.mean, rows[1][c] = ch.scale, rows[2][c] = ch.shift, rows[3][c] = ch.rstd;
    sum_a[c] = sum_b[c] = 0;
  }
  const Block at = block_of(a, image, block);
  const S *x = static_cast<const S*>(a.xs[map]) + at.offset, *grad = static_cast<const S*>(a.grad) + at.offset;
  over_channels<4, W>(a.channels, [&](auto columns, int64_t c, int64_t n) __attribute__((always_inline)) {
    constexpr int K = decltype(columns)::value, V = kVectors<K>;
    vec<T> mean[V], scale[V], shift[V], rstd[V], total_a[V] = {}, total_b[V] = {};
    for (int v = 0; v < V; ++v) {
      mean[v] = load_column<K>(rows[0] + c + v * W, n), scale[v] = load_column<K>(rows[1] + c + v * W, n);
      shift[v] = load_column<K>(rows[2] + c + v * W, n), rstd[v] = load_column<K>(rows[3] + c + v * W, n);
    }
    for (int64_t r = 0; r < at.pixels; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t i = r * a.channels + c + v * W;
        const vec<T> value = load_column<K>(x + i, n) - mean[v], upstream = load_column<K>(grad + i, n);
        const vec<T> g = scale[v] * value + shift[v] > vec<T>{} ? upstream : vec<T>{};
        total_a[v] += g;
        total_b[v] += g * (rstd[v] * value);
      }
    for (int v = 0; v < V; ++v)
      for (int64_t l = 0; l < n; ++l)
        sum_a[c + v * W + l] = double(total_a[v][l]), sum_b[c + v * W + l] = double(total_b[v][l]);
  });
}

template <class S>
void pixels_backward(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const Rows<T> rows{static_cast<T*>(scratch), a.channels};  // mean, scale, shift, direct, slope, constant
  const T w = static_cast<const T*>(a.weights)[map];
  const int64_t width = a.channels / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    T c1, c2;
    group_gradient<T>(a, map, image, g, &c1, &c2);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const Channel<T> ch = channel_of<T>(a, map, image, c);
      rows[0][c] = ch.mean, rows[1][c] = ch.scale, rows[2][c] = ch.shift;
      rows[3][c] = w * ch.scale, rows[4][c] = c2 * ch.rstd, rows[5][c] = c1;
    }
  }
  const Block at = block_of(a, image, block);
  const S *x = static_cast<const S*>(a.xs[map]) + at.offset, *grad = static_cast<const S*>(a.grad) + at.offset;
  S* dx = static_cast<S*>(a.dxs[map]) + at.offset;
  const bool stream = a.streaming && a.channels % W == 0;
  over_channels<4, W>(a.channels, [&](auto columns, int64_t c, int64_t n) __attribute__((always_inline)) {
    constexpr int K = decltype(columns)::value, V = kVectors<K>;
    vec<T> row[6][V];
    for (int k = 0; k < 6; ++k)
      for (int v = 0; v < V; ++v) row[k][v] = load_column<K>(rows[k] + c + v * W, n);
    for (int64_t r = 0; r < at.pixels; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t i = r * a.channels + c + v * W;
        const vec<T> value = load_column<K>(x + i, n) - row[0][v], upstream = load_column<K>(grad + i, n);
        const vec<T> g = row[1][v] * value + row[2][v] > vec<T>{} ? row[3][v] * upstream : vec<T>{};
        const vec<T> result = g - (row[4][v] * value + row[5][v]);
        if (K && stream) store_streaming(dx + i, result);
        else store_column<K>(dx + i, result, n);
      }
  });
  if (stream) streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
