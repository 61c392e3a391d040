// norm_act_mix on NCHW maps: a group's slice of one map stays in the cache between its two sweeps.
#pragma once
#include "norm_act_mix_common.h"

namespace nasdet::NASDET_ISA {
namespace {

// Elements before the first address that a streaming store accepts.
template <class S> NASDET_INLINE int64_t until_aligned(const S* p, int64_t count) {
  constexpr int64_t kStep = kWidth<S> * sizeof(S);
  const int64_t head = (kStep - int64_t(reinterpret_cast<uintptr_t>(p) % kStep)) % kStep / int64_t(sizeof(S));
  return head < count ? head : count;
}

// 16-bit maps in one sweep: deviations from the mean so far, whose square is small beside the maps' own rounding.
template <class S> Moments moments_of_narrow(const S* x, int64_t count) {
  constexpr int W = kWidth<S>;
  constexpr int64_t kBlock = 128 * W;
  Moments all{0, 0, 0};
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t length = count - i < kBlock ? count - i : kBlock;
    const float center = i ? float(all.mean) : load_part(x, 1)[0];
    vec<float> sum[2] = {}, square[2] = {};
    int64_t j = 0;
    for (; j + 2 * W <= length; j += 2 * W) {
      vec<float> d[2];
      load_pair(x + i + j, d[0], d[1]);
      for (int u = 0; u < 2; ++u) {
        d[u] -= splat<float>(center);
        sum[u] += d[u];
        square[u] += d[u] * d[u];
      }
    }
    double total = double(horizontal_sum<float>(sum[0] + sum[1]));
    double squares = double(horizontal_sum<float>(square[0] + square[1]));
    for (; j < length; j += W) {
      const int64_t n = length - j < W ? length - j : W;
      const vec<float> tail = load_part(x + i + j, n);
      for (int64_t l = 0; l < n; ++l)
        total += double(tail[l] - center), squares += double(tail[l] - center) * double(tail[l] - center);
    }
    const double offset = total / double(length), m2 = squares - offset * total;
    merge(all, {double(length), double(center) + offset, m2 > 0 ? m2 : 0});
  }
  return all;
}

template <class S> Moments moments_of(const S* x, int64_t count) {
  if constexpr (sizeof(S) == 2) return moments_of_narrow(x, count);
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>, kBlock = 64 * W;  // small enough to stay in L1 between its two sweeps
  Moments all{0, 0, 0};
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t length = count - i < kBlock ? count - i : kBlock, whole = length / W * W;
    vec<T> sum[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= whole; j += 4 * W)
      for (int u = 0; u < 4; ++u) sum[u] += load(x + i + j + u * W);
    for (; j < whole; j += W) sum[0] += load(x + i + j);
    if (whole < length) sum[1] += load_part(x + i + whole, length - whole);
    const double mean = double(horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]))) / double(length);
    const vec<T> center = splat<T>(T(mean));
    vec<T> square[4] = {};
    for (j = 0; j + 4 * W <= whole; j += 4 * W)
      for (int u = 0; u < 4; ++u) {
        const vec<T> d = load(x + i + j + u * W) - center;
        square[u] += d * d;
      }
    for (; j < whole; j += W) {
      const vec<T> d = load(x + i + j) - center;
      square[0] += d * d;
    }
    double m2 = double(horizontal_sum<T>((square[0] + square[1]) + (square[2] + square[3])));
    if (whole < length) {
      const vec<T> tail = load_part(x + i + whole, length - whole);
      for (int64_t l = 0; l < length - whole; ++l) m2 += double(tail[l] - center[0]) * double(tail[l] - center[0]);
    }
    merge(all, {double(length), double(center[0]), m2});
    // The block's true mean differs from `center` by a rounding, which `merge` must not turn into variance.
    all.mean += (mean - double(center[0])) * double(length) / all.count;
  }
  return all;
}

// Maps that are added to the sum together: they are in the cache at once, and the sum is read and written once for all.
inline constexpr int kTogether = 3;

template <class T> struct Terms {
  Channel<T> channel[kTogether];
  T weight[kTogether];
};

// One channel of kMaps maps: sum (+)= w relu(scale (x - mean) + shift); the last maps' call writes the output.
template <class S, int kMaps, bool kStreaming>
void add_channel(const S* const* x, arithmetic_t<S>* sum, S* out, int64_t count, const Terms<arithmetic_t<S>>& terms,
                 bool first, bool last) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  vec<T> mean[kMaps], scale[kMaps], shift[kMaps], weight[kMaps];
  for (int k = 0; k < kMaps; ++k) {
    mean[k] = splat<T>(terms.channel[k].mean), scale[k] = splat<T>(terms.channel[k].scale);
    shift[k] = splat<T>(terms.channel[k].shift), weight[k] = splat<T>(terms.weight[k]);
  }
  const auto whole = [&](int64_t i) __attribute__((always_inline)) {
    vec<T> value = first ? vec<T>{} : load(sum + i);
    for (int k = 0; k < kMaps; ++k)
      value += weight[k] * maximum<T>(scale[k] * (load(x[k] + i) - mean[k]) + shift[k], vec<T>{});
    return value;
  };
  const auto part = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    vec<T> value = first ? vec<T>{} : load_part(sum + i, n);
    for (int k = 0; k < kMaps; ++k)
      value += weight[k] * maximum<T>(scale[k] * (load_part(x[k] + i, n) - mean[k]) + shift[k], vec<T>{});
    if (last) store_part(out + i, value, n);
    else store_part(sum + i, value, n);
  };
  int64_t i = 0;
  if (kStreaming && last) {
    if (const int64_t head = until_aligned(out, count)) part(0, head), i = head;
    for (; i + W <= count; i += W) store_streaming(out + i, whole(i));
  } else if (last) {
    for (; i + W <= count; i += W) store(out + i, whole(i));
  } else {
    for (; i + W <= count; i += W) store(sum + i, whole(i));
  }
  if (i < count) part(i, count - i);
}

template <class S, int kMaps>
NASDET_INLINE void add_maps(const NormActMixArgs& a, int64_t first, int64_t image, int64_t group,
                            arithmetic_t<S>* sum) {
  using T = arithmetic_t<S>;
  const int64_t width = a.channels / a.groups;
  const bool last = first + kMaps == a.maps;
  for (int64_t c = 0; c < width; ++c) {
    const int64_t channel = group * width + c, start = (image * a.channels + channel) * a.pixels;
    Terms<T> terms;
    const S* x[kMaps];
    for (int k = 0; k < kMaps; ++k) {
      terms.channel[k] = channel_of<T>(a, first + k, image, channel);
      terms.weight[k] = static_cast<const T*>(a.weights)[first + k];
      x[k] = static_cast<const S*>(a.xs[first + k]) + start;
    }
    S* out = static_cast<S*>(a.out) + start;
    if (a.streaming) add_channel<S, kMaps, true>(x, sum + c * a.pixels, out, a.pixels, terms, first == 0, last);
    else add_channel<S, kMaps, false>(x, sum + c * a.pixels, out, a.pixels, terms, first == 0, last);
  }
}

template <class S> void planes_forward(const NormActMixArgs& a, int64_t unit, void* scratch) {
  using T = arithmetic_t<S>;
  const int64_t image = unit / a.groups, group = unit % a.groups, slice = a.channels / a.groups * a.pixels;
  const int64_t start = (image * a.groups + group) * slice;
  T* sum = static_cast<T*>(scratch);
  for (int64_t first = 0; first < a.maps; first += kTogether) {
    const int64_t count = a.maps - first < kTogether ? a.maps - first : kTogether;
    for (int64_t p = first; p < first + count; ++p)
      if (a.normalized[p])
        save_statistics<T>(a, p, image, group, moments_of(static_cast<const S*>(a.xs[p]) + start, slice));
    if (count == 3) add_maps<S, 3>(a, first, image, group, sum);
    if (count == 2) add_maps<S, 2>(a, first, image, group, sum);
    if (count == 1) add_maps<S, 1>(a, first, image, group, sum);
  }
  if (a.streaming) streaming_fence();
}

// Sums over one channel's pixels of kept g and kept g xhat.
template <class S>
void channel_sums(const S* x, const S* grad, int64_t count, const Channel<arithmetic_t<S>>& ch, double* sum_a,
                  double* sum_b) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const vec<T> mean = splat<T>(ch.mean), scale = splat<T>(ch.scale), shift = splat<T>(ch.shift),
               rstd = splat<T>(ch.rstd), zero = {};
  double total_a = 0, total_b = 0;
  for (int64_t begin = 0; begin < count; begin += 1024 * W) {
    const int64_t end = begin + 1024 * W < count ? begin + 1024 * W : count;
    vec<T> part_a[2] = {}, part_b[2] = {};
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W) {
      vec<T> value[2], g[2];
      load_pair(x + i, value[0], value[1]);
      load_pair(grad + i, g[0], g[1]);
      for (int u = 0; u < 2; ++u) {
        value[u] -= mean;
        g[u] = scale * value[u] + shift > zero ? g[u] : zero;
        part_a[u] += g[u];
        part_b[u] += g[u] * (rstd * value[u]);
      }
    }
    for (; i < end; i += W) {
      const int64_t left = end - i < W ? end - i : W;
      const vec<T> value = load_part(x + i, left) - mean;
      const vec<T> g = scale * value + shift > zero ? load_part(grad + i, left) : zero;
      part_a[0] += g;
      part_b[0] += g * (rstd * value);
    }
    total_a += double(horizontal_sum<T>(part_a[0] + part_a[1]));
    total_b += double(horizontal_sum<T>(part_b[0] + part_b[1]));
  }
  *sum_a = total_a;
  *sum_b = total_b;
}

template <class S, bool kStreaming>
void channel_gradient(const S* x, const S* grad, S* dx, int64_t count, const Channel<arithmetic_t<S>>& ch,
                      const Gradient<arithmetic_t<S>>& k) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const vec<T> mean = splat<T>(ch.mean), scale = splat<T>(ch.scale), shift = splat<T>(ch.shift),
               direct = splat<T>(k.direct), zero = {};
  const vec<T> slope = splat<T>(k.c2 * ch.rstd), constant = splat<T>(k.c1);
  const auto part = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vec<T> value = load_part(x + i, n) - mean;
    const vec<T> g = scale * value + shift > zero ? direct * load_part(grad + i, n) : zero;
    store_part(dx + i, g - (slope * value + constant), n);
  };
  int64_t i = kStreaming ? until_aligned(dx, count) : 0;
  if (i) part(0, i);
  for (; i + W <= count; i += W) {
    const vec<T> value = load(x + i) - mean;
    const vec<T> g = scale * value + shift > zero ? direct * load(grad + i) : zero;
    store_to<kStreaming>(dx + i, g - (slope * value + constant));
  }
  if (i < count) part(i, count - i);
}

template <class S> void planes_backward(const NormActMixArgs& a, int64_t unit) {
  using T = arithmetic_t<S>;
  const int64_t image = unit / a.groups, group = unit % a.groups, width = a.channels / a.groups;
  const int64_t start = (image * a.channels + group * width) * a.pixels;
  const S* grad = static_cast<const S*>(a.grad) + start;
  for (int64_t p = 0; p < a.maps; ++p) {
    const S* x = static_cast<const S*>(a.xs[p]) + start;
    const int64_t row = (p * a.batch + image) * a.channels + group * width;
    for (int64_t c = 0; c < width; ++c)
      channel_sums(x + c * a.pixels, grad + c * a.pixels, a.pixels, channel_of<T>(a, p, image, group * width + c),
                   a.sum_a + row + c, a.sum_b + row + c);
    T c1, c2;
    group_gradient<T>(a, p, image, group, &c1, &c2);
    const T w = static_cast<const T*>(a.weights)[p];
    for (int64_t c = 0; c < width; ++c) {
      const Channel<T> ch = channel_of<T>(a, p, image, group * width + c);
      const Gradient<T> k{w * ch.scale, c1, c2};
      S* dx = static_cast<S*>(a.dxs[p]) + start + c * a.pixels;
      if (a.streaming) channel_gradient<S, true>(x + c * a.pixels, grad + c * a.pixels, dx, a.pixels, ch, k);
      else channel_gradient<S, false>(x + c * a.pixels, grad + c * a.pixels, dx, a.pixels, ch, k);
    }
  }
  if (a.streaming) streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
