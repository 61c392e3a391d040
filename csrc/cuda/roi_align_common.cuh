// What the kernels of RoIAlign share: the levels' maps, where a RoI lies, and weighted sums over pixels or bins. A thread
// owns kWidth channels: of one pixel in NHWC (one load), of kWidth planes in NCHW, where the lanes lie along the row.
#pragma once
#include "nasdet/roi.h"
#include "storage.cuh"

namespace nasdet::cuda {

constexpr int kMaxLevels = 8;  // levels of one launch
constexpr int kRoiThreads = 256;

// Passed by value as __grid_constant__: it lies in constant memory, where a run-time index costs no stack frame.
template <class T> struct RoiMaps {
  const void* map[kMaxLevels];         // forward: the features
  void* grad[kMaxLevels];              // backward: their gradients
  int64_t first_tile[kMaxLevels + 1];  // gather form: tiles before a level's first
  T scale[kMaxLevels];
  int32_t height[kMaxLevels], width[kMaxLevels];
  RoiLevels rule;
  int32_t levels, images, channels, pooled_height, pooled_width, sampling_ratio;
  bool aligned;
};

// Where a RoI lies. `empty`: it pools to zero (no such image, no samples, or a map without pixels).
template <class T> struct RoiPlace {
  int64_t image;
  int32_t level, height, width;
  RoiAxis<T> y, x;
  T share;  // of one sample in the average
  bool empty;
};

template <class T>
__device__ __forceinline__ RoiPlace<T> place_on_level(const RoiMaps<T>& maps, const T* roi, int level) {
  RoiPlace<T> place;
  place.image = roi_image(roi[0], maps.images);
  place.level = level;
  place.height = maps.height[level];
  place.width = maps.width[level];
  place.x = roi_axis(roi[1], roi[3], maps.scale[level], maps.pooled_width, maps.sampling_ratio, maps.aligned);
  place.y = roi_axis(roi[2], roi[4], maps.scale[level], maps.pooled_height, maps.sampling_ratio, maps.aligned);
  place.empty = place.image < 0 || place.x.grid <= 0 || place.y.grid <= 0 || place.height <= 0 || place.width <= 0;
  place.share = T(1) / (T(place.y.grid) * T(place.x.grid));
  return place;
}

template <class T> __device__ __forceinline__ RoiPlace<T> place_of(const RoiMaps<T>& maps, const T* roi) {
  int level = maps.levels > 1 ? roi_level(roi[1], roi[2], roi[3], roi[4], maps.rule) : 0;
  if (level >= maps.levels) level = maps.levels - 1;
  return place_on_level(maps, roi, level);
}

// A row or column and its weight; `at` < 0: none.
template <class T> struct Tap {
  int32_t at;
  T weight;
};

// kWidth channels of one image, pixel by pixel.
template <class S, int kWidth, bool kNhwc> struct Channels {
  S* first;  // of pixel (0, 0)
  int64_t row_step, plane_step;
  int32_t pixel_step, there;  // `there`: channels that exist, where fewer than kWidth are left

  __device__ __forceinline__ S* at(int row, int col) const {
    return first + (int64_t(row) * row_step + int64_t(col) * pixel_step);
  }
};

template <int kWidth, bool kNhwc, class S>
__device__ __forceinline__ Channels<S, kWidth, kNhwc> channels_of(S* map, int64_t image, int channels, int height,
                                                                  int width, int channel) {
  const int64_t plane = int64_t(height) * width;
  if constexpr (kNhwc)
    return {map + (image * plane * channels + channel), int64_t(width) * channels, 1, channels, kWidth};
  return {map + (image * channels + channel) * plane, width, plane, 1, channels - channel};
}

template <class S, int kWidth, bool kNhwc>
__device__ __forceinline__ Pack<S, kWidth> load(const Channels<const S, kWidth, kNhwc>& c, int row, int col) {
  const S* at = c.at(row, col);
  if constexpr (kNhwc) return *reinterpret_cast<const Pack<S, kWidth>*>(at);
  Pack<S, kWidth> values{};
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
    if (e < c.there) values.v[e] = at[e * c.plane_step];
  return values;
}

template <class S, int kWidth, bool kNhwc, class T>
__device__ __forceinline__ void store(const Channels<S, kWidth, kNhwc>& c, int row, int col, const T (&sum)[kWidth]) {
  S* at = c.at(row, col);
  if constexpr (kNhwc) {
    Pack<S, kWidth> values;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) values.v[e] = narrow<S>(sum[e]);
    *reinterpret_cast<Pack<S, kWidth>*>(at) = values;
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      if (e < c.there) at[e * c.plane_step] = narrow<S>(sum[e]);
  }
}

// sum += the weighted pixels where `rows` and `cols` cross; every load before the first sum.
template <int kRows, int kCols, class S, int kWidth, bool kNhwc, class T>
__device__ __forceinline__ void add_crossings(const Channels<const S, kWidth, kNhwc>& c, const Tap<T> (&rows)[kRows],
                                              const Tap<T> (&cols)[kCols], T (&sum)[kWidth]) {
  Pack<S, kWidth> values[kRows][kCols];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      values[i][j] = Pack<S, kWidth>{};
      if (rows[i].at >= 0 && cols[j].at >= 0) values[i][j] = load(c, rows[i].at, cols[j].at);
    }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const T weight = rows[i].weight * cols[j].weight;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sum[e] += weight * widen<T>(values[i][j].v[e]);
    }
}

}  // namespace nasdet::cuda
