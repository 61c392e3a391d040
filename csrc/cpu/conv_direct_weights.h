// Weights to panels and back: folding the branches' kernels over the union of their taps, and the gradient of that.
#pragma once
#include "conv_direct_jobs.h"
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {
namespace {

template <class T> struct LaneIndex;
template <> struct LaneIndex<float> { typedef int32_t type __attribute__((vector_size(kBytes))); };
template <> struct LaneIndex<double> { typedef int64_t type __attribute__((vector_size(kBytes))); };

// Swaps the off-diagonal blocks of step x step elements.
template <class T, int kStep> NASDET_INLINE void swap_blocks(vec<T>* v) {
  constexpr int W = kLanes<T>;
  typename LaneIndex<T>::type low, high;
  for (int l = 0; l < W; ++l) low[l] = l & kStep ? W + l - kStep : l, high[l] = l & kStep ? W + l : l + kStep;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & kStep) continue;
    const vec<T> a = v[i], b = v[i + kStep];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

// v[i][j] <-> v[j][i]
template <class T> NASDET_INLINE void transpose(vec<T>* v) {
  constexpr int W = kLanes<T>;
  swap_blocks<T, 1>(v);
  if constexpr (W > 2) swap_blocks<T, 2>(v);
  if constexpr (W > 4) swap_blocks<T, 4>(v);
  if constexpr (W > 8) swap_blocks<T, 8>(v);
}

// v[j][i] = p[i * stride + j] for i < rows, j < columns; zero elsewhere.
template <class S>
NASDET_INLINE void load_transposed(const S* p, int64_t stride, int64_t rows, int64_t columns, vec<arithmetic_t<S>>* v) {
  using T = arithmetic_t<S>;
  constexpr int W = kLanes<T>;
  for (int i = 0; i < W; ++i) v[i] = i < rows ? load_up_to(p + i * stride, columns) : vec<T>{};
  transpose<T>(v);
}

NASDET_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
NASDET_INLINE int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Lanes of a panel's vectors, and the width of its rows.
template <class T> NASDET_INLINE int64_t panel_lanes(ConvForm form, int64_t width) {
  if (form == ConvForm::tiles) return kAmxSide;
  if (!is_narrow(form)) return kLanes<T>;
  return width <= 4 ? 4 : width <= 8 ? 8 : 16;
}
template <class T> NASDET_INLINE int64_t padded_width(ConvForm form, int64_t width) {
  return rounded_up(width, panel_lanes<T>(form, width));
}

// Row of source channel s of `channels` under tap t: spans of channels, in each the taps one after another.
NASDET_INLINE int64_t packed_row(ConvForm form, int64_t t, int64_t taps, int64_t s, int64_t channels) {
  const int64_t span = span_channels(form), first = s / span * span;
  return taps * first + t * at_most(span, packed_channels(form, channels) - first) + (s - first);
}

template <class T> NASDET_INLINE void add_up_to(T* p, vec<T> v, int64_t count) {
  if (count >= kLanes<T>) store(p, load(p) + v);
  else store_part(p, load_part(p, count) + v, count);
}

// Lanes are output channels: rows of the weight are read along (channel, tap).
template <class S> void pack_outputs(const ConvPack& job, const ConvPanel& panel) {
  using T = arithmetic_t<S>;
  constexpr int W = kLanes<T>;
  const int64_t row = job.fan * job.taps_all;
  T* const packed = static_cast<T*>(panel.weights) + job.row * job.corner.lanes + job.corner.lane;
  for (int64_t lane = 0; lane < panel.width; lane += W) {
    const int64_t first = panel.target - job.first + lane, rows = at_most(W, panel.width - lane);
    const S* weight = static_cast<const S*>(job.weight) + first * row;
    const vec<T> mix = job.mix ? load_up_to(static_cast<const T*>(job.mix) + first, rows) : splat<T>(T(1));
    int64_t channel = 0, tap = 0;
    for (int64_t f = 0; f < row; f += W) {
      vec<T> v[W];
      const int64_t columns = at_most(W, row - f);
      load_transposed(weight + f, row, rows, columns, v);
      for (int64_t j = 0; j < columns; ++j) {
        if (const int32_t place = job.place[tap]; place >= 0)
          add_up_to(packed +
                        packed_row(job.form, place, job.taps, job.corner.channel + channel, job.corner.channels) *
                            job.corner.lanes +
                        lane,
                    mix * v[j], rows);
        if (++tap == job.taps_all) tap = 0, ++channel;
      }
    }
  }
}

// Lanes are input channels, rows output channels.
template <class S> void pack_inputs(const ConvPack& job, const ConvPanel& panel) {
  using T = arithmetic_t<S>;
  constexpr int W = kLanes<T>;
  T* const packed = static_cast<T*>(panel.weights) + job.row * job.corner.lanes + job.corner.lane;
  for (int64_t o = 0; o < job.outs; ++o) {
    const int64_t at = job.out - job.first + o;
    const S* weight = static_cast<const S*>(job.weight) + (at * job.fan + job.in) * job.taps_all;
    const vec<T> mix = splat<T>(job.mix ? static_cast<const T*>(job.mix)[at] : T(1));
    for (int64_t lane = 0; lane < panel.width; lane += W)
      for (int64_t tap = 0; tap < job.taps_all; tap += W) {
        vec<T> v[W];
        const int64_t columns = at_most(W, job.taps_all - tap), rows = at_most(W, panel.width - lane);
        load_transposed(weight + lane * job.taps_all + tap, job.taps_all, rows, columns, v);
        for (int64_t j = 0; j < columns; ++j)
          if (const int32_t place = job.place[tap + j]; place >= 0)
            add_up_to(packed +
                          packed_row(job.form, place, job.taps, job.corner.channel + o, job.corner.channels) *
                              job.corner.lanes +
                          lane,
                      mix * v[j], rows);
      }
  }
}

// A panel's rows (even, odd) as rows of pairs of bfloat16, in its own place.
inline void pair_rows(const ConvPanel& panel, int64_t rows, ConvForm form) {
  constexpr int W = kLanes<float>;
  const int64_t width = padded_width<float>(form, panel.width);
  const float* from = static_cast<const float*>(panel.weights);
  uint32_t* to = static_cast<uint32_t*>(panel.weights);
  for (int64_t row = 0; row < rows; row += 2, from += 2 * width, to += width)
    for (int64_t lane = 0; lane < width; lane += W) {
      const int64_t lanes = at_most(W, width - lane);
      const vec_u32 even = __builtin_convertvector(narrow<BFloat16>(load_up_to(from + lane, lanes)), vec_u32);
      const vec_u32 odd = __builtin_convertvector(narrow<BFloat16>(load_up_to(from + width + lane, lanes)), vec_u32);
      const vec_u32 both = even | (odd << 16);
      __builtin_memcpy(to + lane, &both, size_t(lanes) * sizeof *to);
    }
}

template <class S> void unfold(const ConvUnfold& job, const ConvPanel& panel) {
  using T = arithmetic_t<S>;
  constexpr int W = kLanes<T>;
  const int64_t row = job.fan * job.taps_all;
  const int64_t begin = job.first * job.taps_all, end = job.last * job.taps_all;
  const T* const sums = static_cast<const T*>(panel.weights) + job.corner.channel * job.corner.lanes + job.corner.lane;
  for (int64_t lane = 0; lane < panel.width; lane += W) {
    const int64_t first = panel.target - job.first_out + lane, rows = at_most(W, panel.width - lane);
    vec<T> dots[W] = {};
    int64_t channel = 0, tap = 0;
    for (int64_t f = begin; f < end; f += W) {
      vec<T> v[W] = {};
      const int64_t columns = at_most(W, end - f);
      for (int64_t j = 0; j < columns; ++j) {
        if (const int32_t place = job.place[tap]; place >= 0)
          v[j] = load_up_to(sums + (place * job.corner.channels + channel) * job.corner.lanes + lane, rows);
        if (++tap == job.taps_all) tap = 0, ++channel;
      }
      transpose<T>(v);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (first + i) * row + f;
        if (job.mix_grad) dots[i] += v[i] * load_up_to(static_cast<const S*>(job.weight) + at, columns);
        if (!job.weight_grad) continue;
        const vec<T> scaled = job.mix ? v[i] * splat<T>(static_cast<const T*>(job.mix)[first + i]) : v[i];
        S* const to = static_cast<S*>(job.weight_grad) + at;
        if (columns == W) store(to, scaled);
        else store_part(to, scaled, columns);
      }
    }
    for (int64_t i = 0; job.mix_grad && i < rows; ++i)
      static_cast<T*>(job.mix_grad)[first + i] = horizontal_sum<T>(dots[i]);
  }
}

template <class S> void pack(const ConvPack& job, const ConvPanel& panel) {
  job.transposed ? pack_inputs<S>(job, panel) : pack_outputs<S>(job, panel);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
