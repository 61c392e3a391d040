// RoIAlign and its gradient on NHWC maps: the channels of a pixel lie side by side, in the lanes of vectors.
#pragma once
#include "nasdet/simd.h"
#include "roi_align_plan.h"

namespace nasdet::NASDET_ISA {
namespace {

// Where the vectors of one out position go. S: what pooling stores; gradients are accumulated as T.
template <class S, bool kGradient, bool kStreaming> struct RoiPixelOut {
  using T = arithmetic_t<S>;
  char* at;         // the element of channel RoiJob::first
  int64_t channel;  // stride; not 1 when NHWC maps are pooled into an NCHW result

  NASDET_INLINE void put(int64_t c, vec<T> v) const {
    if constexpr (kGradient) {
      T* p = reinterpret_cast<T*>(at) + c;
      store<T>(p, load<T>(p) + v);
    } else if (channel == 1) {
      store_to<kStreaming>(reinterpret_cast<S*>(at) + c, v);
    } else {
      scatter(c, v, kWidth<S>);
    }
  }
  NASDET_INLINE void put_part(int64_t c, vec<T> v, int64_t count) const {
    if constexpr (kGradient) {
      T* p = reinterpret_cast<T*>(at) + c;
      store_part<T>(p, load_part<T>(p, count) + v, count);
    } else {
      scatter(c, v, count);
    }
  }
  void scatter(int64_t c, vec<T> v, int64_t count) const {
    S lanes[kWidth<S>];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<S*>(at)[(c + i) * channel] = lanes[i];
  }
};

// kVectors vectors of channels of one out position.
template <int kVectors, class S, class Out>
NASDET_INLINE void roi_pixel(const RoiWork& w, int row, int column, const S* in, int64_t c, const Out& out) {
  using T = arithmetic_t<S>;
  const T* wy = static_cast<const T*>(w.y.weight);
  const T* wx = static_cast<const T*>(w.x.weight);
  vec<T> sum[kVectors] = {};
  for (int32_t i = w.y.first[row]; i < w.y.first[row + 1]; ++i) {
    const S* line = in + w.y.in[i] * w.in_row + c;
    for (int32_t j = w.x.first[column]; j < w.x.first[column + 1]; ++j) {
      const S* pixel = line + w.x.in[j] * w.in_column;
      const vec<T> weight = splat<T>(wy[i] * wx[j]);
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) sum[u] += weight * load(pixel + u * kWidth<S>);
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < kVectors; ++u) out.put(c + u * kWidth<S>, sum[u]);
}

template <class S, class Out>
NASDET_INLINE void roi_pixel_part(const RoiWork& w, int row, int column, const S* in, int64_t c, int64_t count,
                                  const Out& out) {
  using T = arithmetic_t<S>;
  vec<T> sum = {};
  for (int32_t i = w.y.first[row]; i < w.y.first[row + 1]; ++i)
    for (int32_t j = w.x.first[column]; j < w.x.first[column + 1]; ++j) {
      const T weight = static_cast<const T*>(w.y.weight)[i] * static_cast<const T*>(w.x.weight)[j];
      sum += splat<T>(weight) * load_part(in + w.y.in[i] * w.in_row + w.x.in[j] * w.in_column + c, count);
    }
  out.put_part(c, sum, count);
}

template <class S, bool kGradient, bool kStreaming>
void roi_pixels(const RoiJob& job, const RoiWork* work, int64_t count) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const int64_t channels = job.last - job.first;
  for (int64_t n = 0; n < count; ++n) {
    const RoiWork w = work[n];  // a copy: stores through `out` could change the original
    const S* in = static_cast<const S*>(w.in) + job.first;
    for (int32_t row = 0; row < w.y.count; ++row)
      for (int32_t column = 0; column < w.x.count; ++column) {
        const int64_t at = w.out + w.y.out[row] * w.out_row + w.x.out[column] * w.out_column +
                           (job.first - job.out_first) * w.out_channel;
        const RoiPixelOut<S, kGradient, kStreaming> out{
            static_cast<char*>(job.out) + at * int64_t(kGradient ? sizeof(T) : sizeof(S)), w.out_channel};
        int64_t c = 0;
        for (; c + 8 * W <= channels; c += 8 * W) roi_pixel<8>(w, row, column, in, c, out);
        for (; c + 2 * W <= channels; c += 2 * W) roi_pixel<2>(w, row, column, in, c, out);
        for (; c < channels; c += W) roi_pixel_part(w, row, column, in, c, channels - c < W ? channels - c : W, out);
      }
  }
  if (kStreaming) streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
