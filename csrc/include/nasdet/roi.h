// Geometry of RoIAlign, shared by every kernel on host and device: which level a RoI is pooled from, where its samples lie
// and which pixels they read. An average over a bin's samples is separable: sum_y wy sum_x wx, one factor per axis, so
// everything below is about one axis. T is float, or double when the features are double. Expressions keep torchvision's
// order of operations and fuse no product into a sum: a sample on the border must fall on the same side everywhere.
#pragma once
#include "nasdet/boxes.h"

namespace nasdet {

#if defined(__CUDA_ARCH__)
NASDET_HD float roi_ceil(float v) { return ::ceilf(v); }
NASDET_HD double roi_ceil(double v) { return ::ceil(v); }
NASDET_HD float roi_floor(float v) { return ::floorf(v); }
NASDET_HD double roi_floor(double v) { return ::floor(v); }
NASDET_HD float roi_sqrt(float v) { return ::sqrtf(v); }
NASDET_HD double roi_sqrt(double v) { return ::sqrt(v); }
NASDET_HD float roi_log2(float v) { return ::log2f(v); }
NASDET_HD double roi_log2(double v) { return ::log2(v); }
#else
NASDET_HD float roi_ceil(float v) { return __builtin_ceilf(v); }
NASDET_HD double roi_ceil(double v) { return __builtin_ceil(v); }
NASDET_HD float roi_floor(float v) { return __builtin_floorf(v); }
NASDET_HD double roi_floor(double v) { return __builtin_floor(v); }
NASDET_HD float roi_sqrt(float v) { return __builtin_sqrtf(v); }
NASDET_HD double roi_sqrt(double v) { return __builtin_sqrt(v); }
NASDET_HD float roi_log2(float v) { return __builtin_log2f(v); }
NASDET_HD double roi_log2(double v) { return __builtin_log2(v); }
#endif

constexpr int kRoiTorchvision = 0;  // floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6)
constexpr int kRoiDetectron2 = 1;   // floor(canonical_level + log2(sqrt(area) / canonical_scale + 1e-8))

// How RoIs are spread over levels: k_min is -log2 of the first one's scale, k_max that of the last one where scales halve.
struct RoiLevels {
  int32_t policy, canonical_level, k_min, k_max;
  float canonical_scale;
};

// The index of the level that a RoI is pooled from, in 0..k_max - k_min. An area that is NaN or negative gives 0.
template <class T> NASDET_HD int32_t roi_level(T x1, T y1, T x2, T y2, const RoiLevels& levels) {
  const T area = (x2 - x1) * (y2 - y1);
  if (!(area >= T(0))) return 0;
  const T ratio = roi_sqrt(area) / T(levels.canonical_scale), base = T(levels.canonical_level);
  const T level = levels.policy == kRoiTorchvision ? roi_floor(base + roi_log2(ratio) + T(1e-6))
                                                   : roi_floor(base + roi_log2(ratio + T(1e-8)));
  if (!(level > T(levels.k_min))) return 0;
  return level < T(levels.k_max) ? int32_t(level) - levels.k_min : levels.k_max - levels.k_min;
}

// The image of a RoI: its first column truncated toward zero, or -1 when that is no image of the batch (or NaN).
template <class T> NASDET_HD int64_t roi_image(T value, int64_t batch) {
  return value > T(-1) && value < T(batch) ? int64_t(value) : -1;
}

// One axis of a RoI on its level's map, in pixels of the map.
template <class T> struct RoiAxis {
  T start, bin;  // where the RoI begins, and the length of one bin (negative for an inverted box with `aligned`)
  int32_t grid;  // samples per bin; 0: no samples, and the RoI pools to zero
};

template <class T>
NASDET_HD RoiAxis<T> roi_axis(T low, T high, T scale, int32_t pooled, int32_t sampling_ratio, bool aligned) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = rounded_product(low, scale) - offset;
  T size = rounded_product(high, scale) - offset - start;
  if (!aligned && size < T(1)) size = T(1);  // NaN stays NaN
  const T bin = size / T(pooled);
  if (sampling_ratio > 0) return {start, bin, sampling_ratio};
  const T grid = roi_ceil(bin);
  return {start, bin, grid > T(0) && grid < T(2147483648.0) ? int32_t(grid) : 0};
}

// Where sample `sample` of bin `bin` lies.
template <class T> NASDET_HD T roi_position(const RoiAxis<T>& axis, int32_t bin, int32_t sample) {
  return axis.start + rounded_product(T(bin), axis.bin) + (T(sample) + T(0.5)) * axis.bin / T(axis.grid);
}

// Samples outside [*first, *last) of a bin lie outside a map of `size` pixels: a box far larger than its map costs no more
// than the map. Not tight.
template <class T>
NASDET_HD void roi_samples(const RoiAxis<T>& axis, int32_t bin, int32_t size, int32_t* first, int32_t* last) {
  *first = 0;
  *last = axis.grid;
  if (axis.grid <= 64) return;
  const double step = double(axis.bin) / double(axis.grid);
  const double length = axis.bin < T(0) ? -double(axis.bin) : double(axis.bin);
  if (!(step > 0 || step < 0)) return;
  const double base = double(axis.start) + double(bin) * double(axis.bin);
  const double reach = (axis.start < T(0) ? -double(axis.start) : double(axis.start)) + length * double(bin + 1);
  const double unit = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16, stride = step < 0 ? -step : step;
  const double room = 2 + 8 * unit * reach / stride;  // what rounding may move a position by, in samples
  const double at_low = (-1 - base) / step, at_high = (double(size) - base) / step;
  const double low = (at_low < at_high ? at_low : at_high) - room, high = (at_low < at_high ? at_high : at_low) + room;
  if (low >= double(axis.grid)) *first = axis.grid;
  else if (low > 0) *first = int32_t(low);
  if (high <= double(*first)) *last = *first;
  else if (high < double(axis.grid)) *last = int32_t(high);
}

// The two pixels that a sample reads and their weights. A sample beyond [-1, size] (or NaN) reads nothing: `inside` is
// false, weights are 0 and the pixels must not be read where size is 0.
template <class T> struct RoiTaps {
  int32_t low, high;
  T low_weight, high_weight;
  bool inside;
};

template <class T> NASDET_HD RoiTaps<T> roi_taps(T position, int32_t size) {
  if (!(position >= T(-1) && position <= T(size)) || size <= 0) return {0, 0, T(0), T(0), false};
  if (position <= T(0)) position = T(0);
  const int32_t low = int32_t(position);
  if (low >= size - 1) return {size - 1, size - 1, T(1), T(0), true};
  const T fraction = position - T(low);
  return {low, low + 1, T(1) - fraction, fraction, true};
}

}  // namespace nasdet
