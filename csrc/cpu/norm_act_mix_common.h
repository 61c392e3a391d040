// Arguments and arithmetic shared by the NCHW and NHWC kernels of norm_act_mix.
#pragma once
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
  double* sum_b;  // backward: [maps, batch, channels] sum over pixels of [z > 0] g xhat (of [x > 0] g x without norm)
  int64_t maps, batch, channels, pixels, groups;
  double eps;
  int storage;  // storage_code()
  bool channels_last;
  bool streaming;  // results are larger than the caches and aligned: bypass them
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

constexpr int64_t kPixelBlock =
    512;  // pixels of one task in the NHWC form: fixed, so that sums do not depend on threads

}  // namespace nasdet

namespace nasdet::NASDET_ISA {
namespace {

template <class T> NASDET_INLINE vec<T> maximum(vec<T> a, vec<T> b) { return a < b ? b : a; }  // NaN in a stays
template <class T> NASDET_INLINE T square_root(T v) { return T(__builtin_sqrt(double(v))); }

// What one map does to one channel: z = scale (x - mean) + shift, xhat = rstd (x - mean). Subtracting the mean first keeps
// the digits that folding it into the shift would lose where it is much larger than the deviation.
template <class T> struct Channel { T mean, scale, shift, rstd; };

template <class T>
NASDET_INLINE Channel<T> channel_of(const NormActMixArgs& a, int64_t map, int64_t image, int64_t channel) {
  if (!a.normalized[map]) return {T(0), T(1), T(0), T(1)};
  const int64_t group = channel / (a.channels / a.groups), at = (map * a.batch + image) * a.groups + group;
  const T mean = static_cast<const T*>(a.mean)[at], rstd = static_cast<const T*>(a.rstd)[at];
  const T gamma = static_cast<const T*>(a.gamma)[map * a.channels + channel];
  const T beta = static_cast<const T*>(a.beta)[map * a.channels + channel];
  return {mean, gamma * rstd, beta, rstd};
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

template <class T>
NASDET_INLINE void save_statistics(const NormActMixArgs& a, int64_t map, int64_t image, int64_t group,
                                   const Moments& m) {
  const int64_t at = (map * a.batch + image) * a.groups + group;
  static_cast<T*>(a.mean)[at] = T(m.mean);
  static_cast<T*>(a.rstd)[at] = T(1 / square_root(m.m2 / m.count + a.eps));
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
