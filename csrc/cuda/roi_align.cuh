// The forward kernel of RoIAlign over any number of levels in one launch. A block owns a share of one RoI's outputs. It
// first merges the samples of every bin, axis by axis, into rows (columns) and weights, so that a pixel which several
// samples of a bin read is loaded once. No torch and no runtime header: tests run this file on the CPU.
#pragma once
#include "roi_align_common.cuh"

namespace nasdet::cuda {

constexpr int kTapBytes = 24 << 10;  // shared memory of the merged taps, at most
constexpr int kTapsAdaptive = 32;    // taps of one bin and axis where the samples' number is not known before
constexpr int64_t kMostBins = 1024;  // pooled_height + pooled_width

// The taps of one bin on one axis: `count` merged ones, or -1 where they did not fit and the samples [first, last) count.
struct TapSpan { int32_t count, first, last; };

// Taps for which a bin has room on one axis; bins with more are sampled one by one.
template <class T> inline int tap_capacity(int64_t bins, int64_t sampling_ratio) {
  const int64_t wanted = sampling_ratio > 0 && 2 * sampling_ratio < kTapsAdaptive ? 2 * sampling_ratio : kTapsAdaptive;
  const int64_t fitting = (kTapBytes / bins - int64_t(sizeof(TapSpan))) / int64_t(sizeof(Tap<T>));
  return int(fitting < wanted ? fitting : wanted);
}
template <class T> inline int64_t tap_bytes(int64_t bins, int capacity) {
  return bins * (capacity * int64_t(sizeof(Tap<T>)) + int64_t(sizeof(TapSpan)));
}

// One of the last two taps can be the pixel at hand already; with samples in falling order a pixel may come twice.
template <class T>
__device__ __forceinline__ int add_tap(Tap<T>* taps, int bins, int capacity, int count, int32_t at, T weight) {
  for (int back = 1; back <= 2 && back <= count; ++back) {
    Tap<T>& tap = taps[(count - back) * bins];
    if (tap.at != at) continue;
    tap.weight += weight;
    return count;
  }
  if (count < capacity) taps[count * bins] = {at, weight};
  return count + 1;
}

// Writes the taps of one bin to taps[0], taps[bins], ... (neighbouring bins in neighbouring banks).
template <class T>
__device__ __forceinline__ TapSpan merge_taps(const RoiAxis<T>& axis, int bin, int bins, int size, int capacity,
                                              Tap<T>* taps) {
  TapSpan span{};
  roi_samples(axis, bin, size, &span.first, &span.last);
#pragma unroll 1
  for (int s = span.first; s < span.last && span.count <= capacity; ++s) {
    const RoiTaps<T> t = roi_taps(roi_position(axis, bin, s), size);
    if (!t.inside) continue;
    span.count = add_tap(taps, bins, capacity, span.count, t.low, t.low_weight);
    if (span.count <= capacity && t.high != t.low)
      span.count = add_tap(taps, bins, capacity, span.count, t.high, t.high_weight);
  }
  if (span.count > capacity) span.count = -1;
  return span;
}

template <int kRows, int kCols, class S, int kWidth, bool kNhwc, class T>
__device__ __forceinline__ void add_merged(const Channels<const S, kWidth, kNhwc>& c, const Tap<T>* rows, int row_step,
                                           int row_count, const Tap<T>* cols, int col_step, int col_count,
                                           T (&sum)[kWidth]) {
#pragma unroll 1
  for (int i = 0; i < row_count; i += kRows) {
    Tap<T> some_rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) some_rows[r] = i + r < row_count ? rows[(i + r) * row_step] : Tap<T>{-1, T(0)};
#pragma unroll 1
    for (int j = 0; j < col_count; j += kCols) {
      Tap<T> some_cols[kCols];
#pragma unroll
      for (int q = 0; q < kCols; ++q) some_cols[q] = j + q < col_count ? cols[(j + q) * col_step] : Tap<T>{-1, T(0)};
      add_crossings<kRows, kCols>(c, some_rows, some_cols, sum);
    }
  }
}

template <class S, int kWidth, bool kNhwc, class T>
__device__ __forceinline__ void add_samples(const Channels<const S, kWidth, kNhwc>& c, const RoiPlace<T>& place, int ph,
                                            const TapSpan& y_span, int pw, const TapSpan& x_span, T (&sum)[kWidth]) {
#pragma unroll 1
  for (int i = 2 * y_span.first; i < 2 * y_span.last; ++i) {
    const RoiTaps<T> y = roi_taps(roi_position(place.y, ph, i / 2), place.height);
    if (!y.inside || (i % 2 && y.high == y.low)) continue;
    const Tap<T> row[1] = {i % 2 ? Tap<T>{y.high, y.high_weight} : Tap<T>{y.low, y.low_weight}};
#pragma unroll 1
    for (int j = x_span.first; j < x_span.last; ++j) {
      const RoiTaps<T> x = roi_taps(roi_position(place.x, pw, j), place.width);
      if (!x.inside) continue;
      const Tap<T> cols[2] = {{x.low, x.low_weight}, {x.high == x.low ? -1 : x.high, x.high_weight}};
      add_crossings<1, 2>(c, row, cols, sum);
    }
  }
}

// Blocks that share a multiprocessor, at least: with more, registers would spill.
template <class S, int kWidth, bool kNhwc>
constexpr int kForwardBlocks = sizeof(S) == 8         ? 2
                               : kNhwc && kWidth == 1 ? 4
                                                      : 3;

// Block (part, k) of the grid: `share` items of RoI k, k + gridDim.y, ... An item is kWidth channels of one bin; items
// follow the output in memory, which is [rois, PH, PW, C] (kNhwc) or [rois, C, PH, PW].
template <class S, int kWidth, bool kNhwc>
__global__ void __launch_bounds__(kRoiThreads, kForwardBlocks<S, kWidth, kNhwc>)
    roi_align_forward_kernel(const __grid_constant__ RoiMaps<arithmetic_t<S>> maps, const arithmetic_t<S>* rois, S* out,
                             int64_t count, int share, int capacity) {
  using T = arithmetic_t<S>;
  __shared__ RoiPlace<T> place;
  NASDET_DYNAMIC_SHARED(Tap<T>, taps);
  const int height = maps.pooled_height, width = maps.pooled_width, bins = height * width;
  const int groups = (maps.channels + kWidth - 1) / kWidth;
  Tap<T>*const row_taps = taps, *const col_taps = taps + capacity * height;
  TapSpan* const row_spans = reinterpret_cast<TapSpan*>(taps + capacity * (height + width));
  TapSpan* const col_spans = row_spans + height;
  const int first = int(blockIdx.x) * share, last = first + share < bins * groups ? first + share : bins * groups;
#pragma unroll 1
  for (int64_t k = blockIdx.y; k < count; k += gridDim.y) {
    if (threadIdx.x == 0) place = place_of(maps, rois + 5 * k);
    __syncthreads();
    if (!place.empty) {
      for (int b = int(threadIdx.x); b < height + width; b += kRoiThreads) {
        const bool row = b < height;
        const int bin = row ? b : b - height;
        row_spans[b] = merge_taps(row ? place.y : place.x, bin, row ? height : width, row ? place.height : place.width,
                                  capacity, (row ? row_taps : col_taps) + bin);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int item = first + int(threadIdx.x); item < last; item += kRoiThreads) {
      const int bin = kNhwc ? item / groups : item % bins, group = kNhwc ? item % groups : item / bins;
      const int ph = bin / width, pw = bin % width;
      T sum[kWidth] = {};
      if (!place.empty) {
        const auto c = channels_of<kWidth, kNhwc>(static_cast<const S*>(maps.map[place.level]), place.image,
                                                  maps.channels, place.height, place.width, group * kWidth);
        const TapSpan y = row_spans[ph], x = col_spans[pw];
        if (y.count >= 0 && x.count >= 0)
          add_merged<1, 4>(c, row_taps + ph, height, y.count, col_taps + pw, width, x.count, sum);
        else add_samples(c, place, ph, y, pw, x, sum);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) sum[e] *= place.share;
      }
      store(channels_of<kWidth, kNhwc>(out, k, maps.channels, height, width, group * kWidth), ph, pw, sum);
    }
    __syncthreads();  // before the next RoI's place and taps
  }
}

}  // namespace nasdet::cuda
