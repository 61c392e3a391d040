// norm_act_mix on NCHW maps: a group's slice of one map stays in the cache between its two sweeps.
#pragma once
#include "norm_act_mix_common.h"

namespace nasdet::NASDET_ISA {
namespace {

template <class S> Moments moments_of(const S* x, int64_t count) {
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

enum class Step { first, middle, last, only };

// One channel of one map: sum (+)= w relu(scale x + shift); the last map's step writes the output.
template <class S, Step kStep, bool kStreaming>
void add_channel(const S* x, arithmetic_t<S>* sum, S* out, int64_t count, arithmetic_t<S> w, const Channel<arithmetic_t<S>>& ch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  constexpr bool kAdd = kStep == Step::middle || kStep == Step::last, kOut = kStep == Step::last || kStep == Step::only;
  const vec<T> mean = splat<T>(ch.mean), scale = splat<T>(ch.scale), shift = splat<T>(ch.shift), weight = splat<T>(w), zero = {};
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    vec<T> value = weight * maximum<T>(scale * (load(x + i) - mean) + shift, zero);
    if (kAdd) value += load(sum + i);
    if (kOut) store_to<kStreaming>(out + i, value);
    else store(sum + i, value);
  }
  if (i < count) {
    vec<T> value = weight * maximum<T>(scale * (load_part(x + i, count - i) - mean) + shift, zero);
    if (kAdd) value += load_part(sum + i, count - i);
    if (kOut) store_part(out + i, value, count - i);
    else store_part(sum + i, value, count - i);
  }
}

template <class S> NASDET_INLINE bool can_stream(const S* p) { return reinterpret_cast<uintptr_t>(p) % (kWidth<S> * sizeof(S)) == 0; }

template <class S> void planes_forward(const NormActMixArgs& a, int64_t unit, void* scratch) {
  using T = arithmetic_t<S>;
  const int64_t image = unit / a.groups, group = unit % a.groups, width = a.channels / a.groups;
  const int64_t start = (image * a.channels + group * width) * a.pixels;
  T* sum = static_cast<T*>(scratch);
  for (int64_t p = 0; p < a.maps; ++p) {
    const S* x = static_cast<const S*>(a.xs[p]) + start;
    if (a.normalized[p]) save_statistics<T>(a, p, image, group, moments_of(x, width * a.pixels));
    const T w = static_cast<const T*>(a.weights)[p];
    for (int64_t c = 0; c < width; ++c) {
      const Channel<T> ch = channel_of<T>(a, p, image, group * width + c);
      const S* from = x + c * a.pixels;
      T* at = sum + c * a.pixels;
      S* out = static_cast<S*>(a.out) + start + c * a.pixels;
      if (p + 1 < a.maps) {
        if (p == 0) add_channel<S, Step::first, false>(from, at, out, a.pixels, w, ch);
        else add_channel<S, Step::middle, false>(from, at, out, a.pixels, w, ch);
      } else if (a.streaming && can_stream(out)) {
        if (p == 0) add_channel<S, Step::only, true>(from, at, out, a.pixels, w, ch);
        else add_channel<S, Step::last, true>(from, at, out, a.pixels, w, ch);
      } else {
        if (p == 0) add_channel<S, Step::only, false>(from, at, out, a.pixels, w, ch);
        else add_channel<S, Step::last, false>(from, at, out, a.pixels, w, ch);
      }
    }
  }
  if (a.streaming) streaming_fence();
}

// Sums over one channel's pixels of kept g and kept g xhat.
template <class S>
void channel_sums(const S* x, const S* grad, int64_t count, const Channel<arithmetic_t<S>>& ch, double* sum_a, double* sum_b) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const vec<T> mean = splat<T>(ch.mean), scale = splat<T>(ch.scale), shift = splat<T>(ch.shift), rstd = splat<T>(ch.rstd), zero = {};
  double total_a = 0, total_b = 0;
  for (int64_t begin = 0; begin < count; begin += 1024 * W) {
    const int64_t end = begin + 1024 * W < count ? begin + 1024 * W : count;
    vec<T> part_a[2] = {}, part_b[2] = {};
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W)
      for (int u = 0; u < 2; ++u) {
        const vec<T> value = load(x + i + u * W) - mean;
        const vec<T> g = scale * value + shift > zero ? load(grad + i + u * W) : zero;
        part_a[u] += g;
        part_b[u] += g * (rstd * value);
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
void channel_gradient(const S* x, const S* grad, S* dx, int64_t count, const Channel<arithmetic_t<S>>& ch, const Gradient<arithmetic_t<S>>& k) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const vec<T> mean = splat<T>(ch.mean), scale = splat<T>(ch.scale), shift = splat<T>(ch.shift), direct = splat<T>(k.direct), zero = {};
  const vec<T> slope = splat<T>(k.c2 * ch.rstd), constant = splat<T>(k.c1);
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const vec<T> value = load(x + i) - mean;
    const vec<T> g = scale * value + shift > zero ? direct * load(grad + i) : zero;
    store_to<kStreaming>(dx + i, g - (slope * value + constant));
  }
  if (i < count) {
    const vec<T> value = load_part(x + i, count - i) - mean;
    const vec<T> g = scale * value + shift > zero ? direct * load_part(grad + i, count - i) : zero;
    store_part(dx + i, g - (slope * value + constant), count - i);
  }
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
      channel_sums(x + c * a.pixels, grad + c * a.pixels, a.pixels, channel_of<T>(a, p, image, group * width + c), a.sum_a + row + c, a.sum_b + row + c);
    T c1, c2;
    group_gradient<T>(a, p, image, group, &c1, &c2);
    const T w = static_cast<const T*>(a.weights)[p];
    for (int64_t c = 0; c < width; ++c) {
      const Channel<T> ch = channel_of<T>(a, p, image, group * width + c);
      const Gradient<T> k{w * ch.scale, c1, c2};
      S* dx = static_cast<S*>(a.dxs[p]) + start + c * a.pixels;
      if (a.streaming && can_stream(dx)) channel_gradient<S, true>(x + c * a.pixels, grad + c * a.pixels, dx, a.pixels, ch, k);
      else channel_gradient<S, false>(x + c * a.pixels, grad + c * a.pixels, dx, a.pixels, ch, k);
    }
  }
  if (a.streaming) streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
