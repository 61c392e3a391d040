// y = sum_p w_p relu(GN_p(x_p)) and its gradients. Neither the normalised nor the rectified maps are ever stored: backward
// recomputes them from x_p, the saved mean and 1/std.
//
// Planes (NCHW): a group's slice of one map stays in the cache between the pass that measures it and the pass that uses it.
// Pixels (NHWC): groups interleave, so a map is measured in one sweep and used in a second one.
#include "nasdet/isa.h"
#include "nasdet/simd.h"

namespace nasdet {

struct NormActMixArgs {
  const void* const* xs;      // [maps] each [batch, channels, pixels] or [batch, pixels, channels]
  const int64_t* normalized;  // [maps] 0: w_p relu(x_p)
  const void* weights;        // [maps]; this and the arrays below are float, or double when the maps are double
  const void* gamma;          // [maps, channels]
  const void* beta;           // [maps, channels]
  void* mean;                 // [maps, batch, groups] written by forward, read by backward
  void* rstd;                 // [maps, batch, groups]
  const void* grad;           // backward: laid out as the maps
  void* out;                  // forward
  void* const* dxs;           // backward: [maps]; may be the maps themselves
  double* sum_a;              // backward: [maps, batch, channels] sum over pixels of [z > 0] g
  double* sum_b;              // backward: [maps, batch, channels] sum over pixels of [z > 0] g xhat (of [x > 0] g x without norm)
  int64_t maps, batch, channels, pixels, groups;
  double eps;
  int storage;                // storage_code()
  bool channels_last;
  bool streaming;             // results are larger than the caches and aligned: bypass them
};

// A running mean and sum of squared deviations of `count` values; merged pairwise, so that a large mean costs no digits.
struct Moments { double count, mean, m2; };

__attribute__((always_inline)) inline void merge(Moments& into, const Moments& part) {
  if (part.count == 0) return;
  const double total = into.count + part.count, delta = part.mean - into.mean;
  into.mean += delta * part.count / total;
  into.m2 += part.m2 + delta * delta * into.count * part.count / total;
  into.count = total;
}

constexpr int64_t kPixelBlock = 512;  // pixels of one task in the NHWC form: fixed, so that sums do not depend on threads

}  // namespace nasdet

// NCHW: units are (batch, group) pairs. `sum` has room for one group's slice.
NASDET_DECLARE_KERNEL(void, norm_act_mix_planes_forward, const NormActMixArgs&, int64_t unit, void* sum)
NASDET_DECLARE_KERNEL(void, norm_act_mix_planes_backward, const NormActMixArgs&, int64_t unit)
// NHWC: units are pixel blocks of one image.
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_moments, const NormActMixArgs&, int64_t map, int64_t image, int64_t block, Moments* per_group, void* scratch)
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_forward, const NormActMixArgs&, int64_t image, int64_t block, void* scratch)
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_sums, const NormActMixArgs&, int64_t map, int64_t image, int64_t block, double* a, double* b, void* scratch)
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_backward, const NormActMixArgs&, int64_t map, int64_t image, int64_t block, void* scratch)

namespace nasdet::NASDET_ISA {
namespace {

template <class T> NASDET_INLINE vec<T> maximum(vec<T> a, vec<T> b) { return a < b ? b : a; }  // NaN in a stays
template <class T> NASDET_INLINE T square_root(T v) { return T(__builtin_sqrt(double(v))); }

// What one map does to one channel: z = scale x + shift, xhat = rstd x + offset.
template <class T> struct Channel { T scale, shift, rstd, offset; };

template <class T>
NASDET_INLINE Channel<T> channel_of(const NormActMixArgs& a, int64_t map, int64_t image, int64_t channel) {
  if (!a.normalized[map]) return {T(1), T(0), T(1), T(0)};
  const int64_t group = channel / (a.channels / a.groups), at = (map * a.batch + image) * a.groups + group;
  const T mean = static_cast<const T*>(a.mean)[at], rstd = static_cast<const T*>(a.rstd)[at];
  const T gamma = static_cast<const T*>(a.gamma)[map * a.channels + channel], beta = static_cast<const T*>(a.beta)[map * a.channels + channel];
  return {gamma * rstd, beta - mean * gamma * rstd, rstd, -mean * rstd};
}

// dx = keep * (w gamma rstd) g - c1 - c2 xhat, with keep = [z > 0].
template <class T> struct Gradient { T direct, c1, c2; };

template <class T>
NASDET_INLINE void group_gradient(const NormActMixArgs& a, int64_t map, int64_t image, int64_t group, T* c1, T* c2) {
  *c1 = *c2 = 0;
  if (!a.normalized[map]) return;
  const int64_t width = a.channels / a.groups;
  double sum1 = 0, sum2 = 0;
  for (int64_t c = group * width; c < (group + 1) * width; ++c) {
    const double gamma = static_cast<const T*>(a.gamma)[map * a.channels + c];
    sum1 += gamma * a.sum_a[(map * a.batch + image) * a.channels + c];
    sum2 += gamma * a.sum_b[(map * a.batch + image) * a.channels + c];
  }
  const double rstd = static_cast<const T*>(a.rstd)[(map * a.batch + image) * a.groups + group];
  const double factor = static_cast<const T*>(a.weights)[map] * rstd / (double(width) * double(a.pixels));
  *c1 = T(factor * sum1);
  *c2 = T(factor * sum2);
}

template <class T> NASDET_INLINE void save_statistics(const NormActMixArgs& a, int64_t map, int64_t image, int64_t group, const Moments& m) {
  const int64_t at = (map * a.batch + image) * a.groups + group;
  static_cast<T*>(a.mean)[at] = T(m.mean);
  static_cast<T*>(a.rstd)[at] = T(1 / square_root(m.m2 / m.count + a.eps));
}

// ---- NCHW -----------------------------------------------------------------------------------------------------------

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
  const vec<T> scale = splat<T>(ch.scale), shift = splat<T>(ch.shift), weight = splat<T>(w), zero = {};
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    vec<T> value = weight * maximum<T>(scale * load(x + i) + shift, zero);
    if (kAdd) value += load(sum + i);
    if (kOut) store_to<kStreaming>(out + i, value);
    else store(sum + i, value);
  }
  if (i < count) {
    vec<T> value = weight * maximum<T>(scale * load_part(x + i, count - i) + shift, zero);
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
  const vec<T> scale = splat<T>(ch.scale), shift = splat<T>(ch.shift), rstd = splat<T>(ch.rstd), offset = splat<T>(ch.offset), zero = {};
  double total_a = 0, total_b = 0;
  for (int64_t begin = 0; begin < count; begin += 1024 * W) {
    const int64_t end = begin + 1024 * W < count ? begin + 1024 * W : count;
    vec<T> part_a[2] = {}, part_b[2] = {};
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W)
      for (int u = 0; u < 2; ++u) {
        const vec<T> value = load(x + i + u * W);
        const vec<T> g = scale * value + shift > zero ? load(grad + i + u * W) : zero;
        part_a[u] += g;
        part_b[u] += g * (rstd * value + offset);
      }
    for (; i < end; i += W) {
      const int64_t left = end - i < W ? end - i : W;
      const vec<T> value = load_part(x + i, left);
      const vec<T> g = scale * value + shift > zero ? load_part(grad + i, left) : zero;
      part_a[0] += g;
      part_b[0] += g * (rstd * value + offset);
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
  const vec<T> scale = splat<T>(ch.scale), shift = splat<T>(ch.shift), direct = splat<T>(k.direct), zero = {};
  // c1 + c2 xhat = c2 rstd x + (c2 offset + c1)
  const vec<T> slope = splat<T>(k.c2 * ch.rstd), constant = splat<T>(k.c2 * ch.offset + k.c1);
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const vec<T> value = load(x + i);
    const vec<T> g = scale * value + shift > zero ? direct * load(grad + i) : zero;
    store_to<kStreaming>(dx + i, g - (slope * value + constant));
  }
  if (i < count) {
    const vec<T> value = load_part(x + i, count - i);
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

// ---- NHWC -----------------------------------------------------------------------------------------------------------

struct Block { int64_t offset, pixels; };  // elements from the tensor's start; pixels of this block

NASDET_INLINE Block block_of(const NormActMixArgs& a, int64_t image, int64_t block) {
  const int64_t first = block * kPixelBlock, left = a.pixels - first;
  return {(image * a.pixels + first) * a.channels, left < kPixelBlock ? left : kPixelBlock};
}

// Loads and stores that are whole vectors except at the last channels.
template <class S> NASDET_INLINE vec<arithmetic_t<S>> load_n(const S* p, int64_t n) { return n >= kWidth<S> ? load(p) : load_part(p, n); }
template <class S> NASDET_INLINE void store_n(S* p, vec<arithmetic_t<S>> v, int64_t n) {
  if (n >= kWidth<S>) store(p, v);
  else store_part(p, v, n);
}

template <class S> void pixels_moments(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, Moments* per_group, void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>, kRows = 32;  // rows that stay in L1 between their two sweeps
  const Block at = block_of(a, image, block);
  const S* x = static_cast<const S*>(a.xs[map]) + at.offset;
  T *means = static_cast<T*>(scratch), *squares = means + a.channels;
  for (int64_t first = 0; first < at.pixels; first += kRows) {
    const int64_t count = at.pixels - first < kRows ? at.pixels - first : kRows, total = first + count;
    const vec<T> share = splat<T>(T(count) / T(total)), spread = splat<T>(T(first) * T(count) / T(total));
    for (int64_t c = 0; c < a.channels; c += W) {
      const int64_t n = a.channels - c;
      vec<T> sum = {}, square = {};
      for (int64_t r = first; r < total; ++r) sum += load_n(x + r * a.channels + c, n);
      vec<T> mean = sum / splat<T>(T(count));
      for (int64_t r = first; r < total; ++r) {
        const vec<T> d = load_n(x + r * a.channels + c, n) - mean;
        square += d * d;
      }
      if (first) {
        const vec<T> before = load_n(means + c, n), delta = mean - before;
        mean = before + delta * share;
        square += load_n(squares + c, n) + delta * delta * spread;
      }
      store_n(means + c, mean, n);
      store_n(squares + c, square, n);
    }
  }
  const int64_t width = a.channels / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    per_group[g] = {0, 0, 0};
    for (int64_t c = g * width; c < (g + 1) * width; ++c) merge(per_group[g], {double(at.pixels), double(means[c]), double(squares[c])});
  }
}

// Rows of per-channel coefficients: scale, shift, and for backward also direct, slope, constant or rstd, offset.
template <class T> struct Rows {
  T* base;
  int64_t channels;
  T* operator[](int row) const { return base + row * channels; }
};

template <class S> void pixels_forward(const NormActMixArgs& a, int64_t image, int64_t block, void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const Rows<T> rows{static_cast<T*>(scratch), a.channels};  // 2 rows a map: w scale, w shift
  for (int64_t p = 0; p < a.maps; ++p)
    for (int64_t c = 0; c < a.channels; ++c) {
      const Channel<T> ch = channel_of<T>(a, p, image, c);
      rows[2 * p][c] = ch.scale;
      rows[2 * p + 1][c] = ch.shift;
    }
  const Block at = block_of(a, image, block);
  S* out = static_cast<S*>(a.out) + at.offset;
  const bool stream = a.streaming && a.channels % W == 0;
  for (int64_t r = 0; r < at.pixels; ++r)
    for (int64_t c = 0; c < a.channels; c += W) {
      const int64_t n = a.channels - c, i = r * a.channels + c;
      vec<T> sum = {};
      for (int64_t p = 0; p < a.maps; ++p) {
        const vec<T> x = load_n(static_cast<const S*>(a.xs[p]) + at.offset + i, n);
        const vec<T> z = load_n(rows[2 * p] + c, n) * x + load_n(rows[2 * p + 1] + c, n);
        sum += splat<T>(static_cast<const T*>(a.weights)[p]) * maximum<T>(z, vec<T>{});
      }
      if (stream) store_streaming(out + i, sum);
      else store_n(out + i, sum, n);
    }
  if (stream) streaming_fence();
}

template <class S> void pixels_sums(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, double* sum_a, double* sum_b, void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>, kRows = 16;
  const Rows<T> rows{static_cast<T*>(scratch), a.channels};  // scale, shift, rstd, offset, sums
  for (int64_t c = 0; c < a.channels; ++c) {
    const Channel<T> ch = channel_of<T>(a, map, image, c);
    rows[0][c] = ch.scale, rows[1][c] = ch.shift, rows[2][c] = ch.rstd, rows[3][c] = ch.offset;
    rows[4][c] = rows[5][c] = 0;
  }
  const Block at = block_of(a, image, block);
  const S *x = static_cast<const S*>(a.xs[map]) + at.offset, *grad = static_cast<const S*>(a.grad) + at.offset;
  for (int64_t first = 0; first < at.pixels; first += kRows) {
    const int64_t end = at.pixels - first < kRows ? at.pixels : first + kRows;
    for (int64_t c = 0; c < a.channels; c += W) {
      const int64_t n = a.channels - c;
      const vec<T> scale = load_n(rows[0] + c, n), shift = load_n(rows[1] + c, n), rstd = load_n(rows[2] + c, n), offset = load_n(rows[3] + c, n);
      vec<T> total_a = load_n(rows[4] + c, n), total_b = load_n(rows[5] + c, n);
      for (int64_t r = first; r < end; ++r) {
        const vec<T> value = load_n(x + r * a.channels + c, n);
        const vec<T> g = scale * value + shift > vec<T>{} ? load_n(grad + r * a.channels + c, n) : vec<T>{};
        total_a += g;
        total_b += g * (rstd * value + offset);
      }
      store_n(rows[4] + c, total_a, n);
      store_n(rows[5] + c, total_b, n);
    }
  }
  for (int64_t c = 0; c < a.channels; ++c) sum_a[c] = double(rows[4][c]), sum_b[c] = double(rows[5][c]);
}

template <class S> void pixels_backward(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const Rows<T> rows{static_cast<T*>(scratch), a.channels};  // scale, shift, direct, slope, constant
  const T w = static_cast<const T*>(a.weights)[map];
  const int64_t width = a.channels / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    T c1, c2;
    group_gradient<T>(a, map, image, g, &c1, &c2);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const Channel<T> ch = channel_of<T>(a, map, image, c);
      rows[0][c] = ch.scale, rows[1][c] = ch.shift, rows[2][c] = w * ch.scale;
      rows[3][c] = c2 * ch.rstd, rows[4][c] = c2 * ch.offset + c1;
    }
  }
  const Block at = block_of(a, image, block);
  const S *x = static_cast<const S*>(a.xs[map]) + at.offset, *grad = static_cast<const S*>(a.grad) + at.offset;
  S* dx = static_cast<S*>(a.dxs[map]) + at.offset;
  const bool stream = a.streaming && a.channels % W == 0;
  for (int64_t r = 0; r < at.pixels; ++r)
    for (int64_t c = 0; c < a.channels; c += W) {
      const int64_t n = a.channels - c, i = r * a.channels + c;
      const vec<T> value = load_n(x + i, n);
      const vec<T> keep = load_n(rows[0] + c, n) * value + load_n(rows[1] + c, n);
      const vec<T> g = keep > vec<T>{} ? load_n(rows[2] + c, n) * load_n(grad + i, n) : vec<T>{};
      const vec<T> result = g - (load_n(rows[3] + c, n) * value + load_n(rows[4] + c, n));
      if (stream) store_streaming(dx + i, result);
      else store_n(dx + i, result, n);
    }
  if (stream) streaming_fence();
}

}  // namespace

#define NASDET_BY_STORAGE(call)               \
  switch (a.storage) {                        \
    case 0: { using S = float; call; } break;    \
    case 1: { using S = double; call; } break;   \
    case 2: { using S = BFloat16; call; } break; \
    case 3: { using S = Half; call; } break;     \
  }

void norm_act_mix_planes_forward(const NormActMixArgs& a, int64_t unit, void* sum) { NASDET_BY_STORAGE(planes_forward<S>(a, unit, sum)) }
void norm_act_mix_planes_backward(const NormActMixArgs& a, int64_t unit) { NASDET_BY_STORAGE(planes_backward<S>(a, unit)) }
void norm_act_mix_pixels_moments(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, Moments* per_group, void* scratch) {
  NASDET_BY_STORAGE(pixels_moments<S>(a, map, image, block, per_group, scratch))
}
void norm_act_mix_pixels_forward(const NormActMixArgs& a, int64_t image, int64_t block, void* scratch) {
  NASDET_BY_STORAGE(pixels_forward<S>(a, image, block, scratch))
}
void norm_act_mix_pixels_sums(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, double* sum_a, double* sum_b, void* scratch) {
  NASDET_BY_STORAGE(pixels_sums<S>(a, map, image, block, sum_a, sum_b, scratch))
}
void norm_act_mix_pixels_backward(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, void* scratch) {
  NASDET_BY_STORAGE(pixels_backward<S>(a, map, image, block, scratch))
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include <cmath>
#include <memory>

#include "nasdet/checks.h"

namespace nasdet {
namespace {

constexpr int64_t kStreamingBytes = 4 << 20;  // results beyond this would push useful data out of the caches
constexpr int64_t kRowsPerMap = 6;            // most rows of per-channel scratch that a kernel uses

bool channels_last(const Tensor& x) {
  const int64_t C = x.size(1), W = x.size(3), H = x.size(2);
  if (C == 1 || H * W == 1) return false;  // both at once: treat as contiguous
  return x.stride(1) == 1 && (W == 1 || x.stride(3) == C) && (H == 1 || x.stride(2) == W * C) && (x.size(0) == 1 || x.stride(0) == H * W * C);
}

// All that forward and backward share: the checked inputs in one layout, and the kernels' arguments.
struct Call {
  std::vector<Tensor> maps;
  std::vector<const void*> pointers;
  std::vector<int64_t> normalized;
  Tensor weights, gamma, beta;
  NormActMixArgs args{};
  int64_t blocks = 0;
  size_t arithmetic_size = 4;

  Call(const std::vector<Tensor>& xs, const Tensor& w, const Tensor& g, const Tensor& b, int64_t groups, double eps,
       const std::vector<int64_t>& flags)
      : normalized(flags), weights(torch::stable::contiguous(w)), gamma(torch::stable::contiguous(g)), beta(torch::stable::contiguous(b)) {
    STD_TORCH_CHECK(!xs.empty() && xs[0].dim() == 4, "xs must hold maps of shape (N, C, H, W)");
    const Tensor& first = xs[0];
    const int64_t P = xs.size(), C = first.size(1);
    for (const Tensor& x : xs)
      STD_TORCH_CHECK(same(x.sizes(), first.sizes()) && x.scalar_type() == first.scalar_type() && x.is_cpu(), "xs must have one shape and dtype, on the CPU");
    const ScalarType arithmetic = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    for (const Tensor* t : {&weights, &gamma, &beta})
      STD_TORCH_CHECK(t->scalar_type() == arithmetic && t->is_cpu(), "weights, gn_weight and gn_bias must be float32 (float64 for float64 maps) on the CPU");
    STD_TORCH_CHECK(weights.numel() == P && gamma.numel() == P * C && beta.numel() == P * C && int64_t(flags.size()) == P, "weights, gn_weight, gn_bias and normalized must have one row per map");
    STD_TORCH_CHECK(groups > 0 && C % groups == 0, "num_groups must divide the channels, got ", groups, " for ", C);
    const bool nhwc = channels_last(first);
    Tensor like = torch::stable::empty_like(first);
    if (!nhwc && !like.is_contiguous()) like = torch::stable::contiguous(like);
    for (const Tensor& x : xs) maps.push_back(in_layout_of(x, like));
    for (const Tensor& x : maps) pointers.push_back(x.const_data_ptr());
    arithmetic_size = arithmetic == ScalarType::Double ? 8 : 4;
    args.xs = pointers.data();
    args.normalized = normalized.data();
    args.weights = weights.const_data_ptr();
    args.gamma = gamma.const_data_ptr();
    args.beta = beta.const_data_ptr();
    args.maps = P, args.batch = first.size(0), args.channels = C, args.pixels = first.size(2) * first.size(3);
    args.groups = groups, args.eps = eps;
    args.storage = storage_code(first, "xs");
    args.channels_last = nhwc;
    blocks = (args.pixels + kPixelBlock - 1) / kPixelBlock;
  }

  int64_t bytes() const { return maps[0].numel() * int64_t(maps[0].element_size()); }
  std::unique_ptr<char[]> scratch(int64_t elements) const { return std::unique_ptr<char[]>(new char[elements * arithmetic_size]); }
};

bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 64 == 0; }

void set(void* array, int64_t index, double value, size_t size) {
  if (size == 8) static_cast<double*>(array)[index] = value;
  else static_cast<float*>(array)[index] = float(value);
}

void measure_pixels(Call& call) {
  NormActMixArgs& a = call.args;
  std::vector<Moments> partial(a.maps * a.batch * call.blocks * a.groups);
  const auto kernel = NASDET_KERNEL(norm_act_mix_pixels_moments);
  torch::stable::parallel_for(0, a.maps * a.batch * call.blocks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = call.scratch(kRowsPerMap * a.channels);
    for (int64_t t = begin; t < end; ++t)
      if (const int64_t row = t / call.blocks; call.normalized[row / a.batch])
        kernel(a, row / a.batch, row % a.batch, t % call.blocks, &partial[t * a.groups], scratch.get());
  });
  for (int64_t row = 0; row < a.maps * a.batch; ++row)
    for (int64_t g = 0; g < a.groups && call.normalized[row / a.batch]; ++g) {
      Moments all{0, 0, 0};
      for (int64_t block = 0; block < call.blocks; ++block) merge(all, partial[(row * call.blocks + block) * a.groups + g]);
      set(a.mean, row * a.groups + g, all.mean, call.arithmetic_size);
      set(a.rstd, row * a.groups + g, 1 / std::sqrt(all.m2 / all.count + a.eps), call.arithmetic_size);
    }
}

std::tuple<Tensor, Tensor, Tensor> norm_act_mix(std::vector<Tensor> xs, Tensor weights, Tensor gamma, Tensor beta, int64_t groups, double eps, std::vector<int64_t> normalized, bool /*overwrite_inputs: for backward */) {
  Call call(xs, weights, gamma, beta, groups, eps, normalized);
  NormActMixArgs& a = call.args;
  Tensor out = torch::stable::empty_like(call.maps[0]);
  Tensor mean = torch::stable::new_zeros(call.weights, {a.maps, a.batch, groups}), rstd = torch::stable::new_zeros(call.weights, {a.maps, a.batch, groups});
  a.mean = mean.mutable_data_ptr(), a.rstd = rstd.mutable_data_ptr(), a.out = out.mutable_data_ptr();
  a.streaming = call.bytes() >= kStreamingBytes && aligned(out);
  if (out.numel() == 0) return {out, mean, rstd};
  if (a.channels_last) {
    measure_pixels(call);
    const auto kernel = NASDET_KERNEL(norm_act_mix_pixels_forward);
    torch::stable::parallel_for(0, a.batch * call.blocks, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = call.scratch(2 * a.maps * a.channels);
      for (int64_t t = begin; t < end; ++t) kernel(a, t / call.blocks, t % call.blocks, scratch.get());
    });
  } else {
    const auto kernel = NASDET_KERNEL(norm_act_mix_planes_forward);
    torch::stable::parallel_for(0, a.batch * groups, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = call.scratch(a.maps > 1 ? a.channels / groups * a.pixels : 0);
      for (int64_t t = begin; t < end; ++t) kernel(a, t, scratch.get());
    });
  }
  return {out, mean, rstd};
}

void pixels_gradients(Call& call) {
  NormActMixArgs& a = call.args;
  const int64_t tasks = a.maps * a.batch * call.blocks, rows = a.maps * a.batch;
  std::vector<double> partial(2 * tasks * a.channels);
  const auto sums = NASDET_KERNEL(norm_act_mix_pixels_sums);
  const auto apply = NASDET_KERNEL(norm_act_mix_pixels_backward);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = call.scratch(kRowsPerMap * a.channels);
    for (int64_t t = begin; t < end; ++t) {
      double* at = &partial[2 * t * a.channels];
      sums(a, t / call.blocks / a.batch, t / call.blocks % a.batch, t % call.blocks, at, at + a.channels, scratch.get());
    }
  });
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < call.blocks; ++block) {
      const double* at = &partial[2 * (row * call.blocks + block) * a.channels];
      for (int64_t c = 0; c < a.channels; ++c) {
        a.sum_a[row * a.channels + c] += at[c];
        a.sum_b[row * a.channels + c] += at[a.channels + c];
      }
    }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = call.scratch(kRowsPerMap * a.channels);
    for (int64_t t = begin; t < end; ++t) apply(a, t / call.blocks / a.batch, t / call.blocks % a.batch, t % call.blocks, scratch.get());
  });
}

// Gradients of weights, gamma and beta from the per-channel sums: dw = sum gamma B + beta A, dgamma = w B, dbeta = w A.
std::tuple<Tensor, Tensor, Tensor> parameter_gradients(const Call& call) {
  const NormActMixArgs& a = call.args;
  Tensor dweights = torch::stable::new_zeros(call.weights, {a.maps});
  Tensor dgamma = torch::stable::new_zeros(call.gamma, {a.maps, a.channels}), dbeta = torch::stable::new_zeros(call.beta, {a.maps, a.channels});
  const auto get = [&](const void* array, int64_t i) { return call.arithmetic_size == 8 ? static_cast<const double*>(array)[i] : double(static_cast<const float*>(array)[i]); };
  for (int64_t p = 0; p < a.maps; ++p) {
    const double w = get(a.weights, p);
    double dw = 0;
    for (int64_t c = 0; c < a.channels; ++c) {
      double sum_a = 0, sum_b = 0;
      for (int64_t n = 0; n < a.batch; ++n) {
        sum_a += a.sum_a[(p * a.batch + n) * a.channels + c];
        sum_b += a.sum_b[(p * a.batch + n) * a.channels + c];
      }
      const int64_t at = p * a.channels + c;
      if (!call.normalized[p]) {
        dw += sum_b;
        continue;
      }
      dw += get(a.gamma, at) * sum_b + get(a.beta, at) * sum_a;
      set(dgamma.mutable_data_ptr(), at, w * sum_b, call.arithmetic_size);
      set(dbeta.mutable_data_ptr(), at, w * sum_a, call.arithmetic_size);
    }
    set(dweights.mutable_data_ptr(), p, dw, call.arithmetic_size);
  }
  return {dweights, dgamma, dbeta};
}

std::tuple<Tensor, Tensor, Tensor> backward_into(Call& call, const Tensor& grad, const Tensor& mean, const Tensor& rstd, std::vector<Tensor>& dxs) {
  NormActMixArgs& a = call.args;
  STD_TORCH_CHECK(same(grad.sizes(), call.maps[0].sizes()) && grad.scalar_type() == call.maps[0].scalar_type(), "grad must have the maps' shape and dtype");
  const Tensor g = in_layout_of(grad, call.maps[0]), means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  STD_TORCH_CHECK(means.numel() == a.maps * a.batch * a.groups && rstds.numel() == means.numel(), "mean and rstd must have shape (maps, N, num_groups)");
  std::vector<void*> pointers;
  bool streaming = call.bytes() >= kStreamingBytes;
  for (size_t p = 0; p < dxs.size(); ++p) {
    pointers.push_back(dxs[p].mutable_data_ptr());
    streaming &= aligned(dxs[p]) && pointers[p] != call.pointers[p];  // a map's own lines are in the cache already
  }
  std::vector<double> sums(2 * a.maps * a.batch * a.channels);
  a.grad = g.const_data_ptr(), a.mean = const_cast<void*>(means.const_data_ptr()), a.rstd = const_cast<void*>(rstds.const_data_ptr());
  a.dxs = pointers.data(), a.sum_a = sums.data(), a.sum_b = sums.data() + a.maps * a.batch * a.channels, a.streaming = streaming;
  if (g.numel()) {
    if (a.channels_last) {
      pixels_gradients(call);
    } else {
      const auto kernel = NASDET_KERNEL(norm_act_mix_planes_backward);
      torch::stable::parallel_for(0, a.batch * a.groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) kernel(a, t);
      });
    }
  }
  return parameter_gradients(call);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> norm_act_mix_backward(
    Tensor grad, std::vector<Tensor> xs, Tensor weights, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd, int64_t groups, std::vector<int64_t> normalized) {
  Call call(xs, weights, gamma, beta, groups, 0, normalized);
  std::vector<Tensor> dxs;
  for (size_t p = 0; p < xs.size(); ++p) dxs.push_back(torch::stable::empty_like(call.maps[0]));
  auto [dweights, dgamma, dbeta] = backward_into(call, grad, mean, rstd, dxs);
  return {dxs, dweights, dgamma, dbeta};
}

// As above, with each map's gradient written over the map.
std::tuple<Tensor, Tensor, Tensor> norm_act_mix_backward_inplace(
    Tensor grad, std::vector<Tensor> xs, Tensor weights, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd, int64_t groups, std::vector<int64_t> normalized) {
  Call call(xs, weights, gamma, beta, groups, 0, normalized);
  std::vector<Tensor> dxs = call.maps;
  auto result = backward_into(call, grad, mean, rstd, dxs);
  for (size_t p = 0; p < xs.size(); ++p)
    if (call.maps[p].const_data_ptr() != xs[p].const_data_ptr()) torch::stable::copy_(xs[p], call.maps[p]);  // was another layout
  return result;
}

}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("norm_act_mix", TORCH_BOX(&nasdet::norm_act_mix));
  m.impl("norm_act_mix_backward", TORCH_BOX(&nasdet::norm_act_mix_backward));
  m.impl("norm_act_mix_backward_", TORCH_BOX(&nasdet::norm_act_mix_backward_inplace));
}
#endif
