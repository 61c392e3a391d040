// What both forms of RoIAlign's gradient share: a RoI's weights over a tile of its map. A pixel's gradient is the sum over
// bins of row weight x column weight x gradient of the bin; the weights of a tile's rows and columns are a small table.
#pragma once
#include "roi_align_common.cuh"

namespace nasdet::cuda {

constexpr int kBinChunk = 32;  // bins of one axis in a table; more take several rounds

// The bins with a weight in a row (column) of the tile: first..last; none where last < first.
struct BinRange { int16_t first, last; };

// One axis of a table, [pixels][bins], and its ranges.
template <class T> struct AxisTable {
  T* weights;
  BinRange* ranges;
  int bins;
};

// By value: a reference to one of two local structs would put both on the stack.
template <class T> __device__ __forceinline__ RoiAxis<T> axis_of(const RoiPlace<T>& place, bool y) {
  return {y ? place.y.start : place.x.start, y ? place.y.bin : place.x.bin, y ? place.y.grid : place.x.grid};
}

// Pixels first..last of a map's axis hold every pixel that a sample reads; last < first where there is none.
template <class T>
__device__ __forceinline__ void pixel_extent(const RoiAxis<T>& axis, int bins, int size, int* first, int* last) {
  *first = 0;
  *last = -1;
  const T a = roi_position(axis, 0, 0), b = roi_position(axis, bins - 1, axis.grid - 1);
  const T length = axis.bin < T(0) ? -axis.bin : axis.bin, start = axis.start < T(0) ? -axis.start : axis.start;
  const T rounding = (start + T(bins) * length) *
                     (sizeof(T) == 4 ? T(1e-6) : T(1e-15));  // positions of other bins may be that far outside
  const T low = (a < b ? a : b) - rounding, high = (a < b ? b : a) + rounding;
  if (!(high >= T(-1) && low <= T(size))) return;
  *first = low <= T(0) ? 0 : low >= T(size - 1) ? size - 1 : int(low);
  *last = high >= T(size - 1) ? size - 1 : high <= T(0) ? (size > 1 ? 1 : 0) : int(high) + 1;
}

// The column of one bin in a table of `pixels` pixels from `first_pixel`: column[0], column[bins], ...
template <class T>
__device__ __forceinline__ void fill_weights(const RoiAxis<T>& axis, int bin, int size, int first_pixel, int pixels,
                                             T factor, T* column, int bins) {
  for (int i = 0; i < pixels; ++i) column[i * bins] = T(0);
  int first, last;
  roi_samples(axis, bin, size, &first, &last);
  if (first >= last) return;
  const T a = roi_position(axis, bin, first), b = roi_position(axis, bin, last - 1);  // in order: roundings keep it
  if ((a < b ? b : a) < T(first_pixel) - T(1) || (a < b ? a : b) > T(first_pixel) + T(pixels)) return;
#pragma unroll 1
  for (int s = first; s < last; ++s) {
    const RoiTaps<T> t = roi_taps(roi_position(axis, bin, s), size);
    if (!t.inside) continue;
    const int low = t.low - first_pixel, high = t.high - first_pixel;
    if (low >= 0 && low < pixels) column[low * bins] += factor * t.low_weight;
    if (high >= 0 && high < pixels) column[high * bins] += factor * t.high_weight;
  }
}

template <class T> __device__ __forceinline__ BinRange range_of(const T* weights, int bins) {
  BinRange range{0, -1};
  for (int b = 0; b < bins; ++b) {
    if (weights[b] == T(0)) continue;
    if (range.last < 0) range.first = int16_t(b);
    range.last = int16_t(b);
  }
  return range;
}

// sum += the weighted gradients of the bins that reach pixel (row, col) of the tile; `c` holds the RoI's bins as pixels.
template <int kRows, int kCols, class S, int kWidth, bool kNhwc, class T>
__device__ __forceinline__ void add_bins(const Channels<const S, kWidth, kNhwc>& c, const AxisTable<T>& y, int row,
                                         int first_y, const AxisTable<T>& x, int col, int first_x, T (&sum)[kWidth]) {
  const BinRange rows = y.ranges[row], cols = x.ranges[col];
#pragma unroll 1
  for (int p = rows.first; p <= rows.last; p += kRows) {
    Tap<T> some_rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      some_rows[i] = p + i <= rows.last ? Tap<T>{first_y + p + i, y.weights[row * y.bins + p + i]} : Tap<T>{-1, T(0)};
#pragma unroll 1
    for (int q = cols.first; q <= cols.last; q += kCols) {
      Tap<T> some_cols[kCols];
#pragma unroll
      for (int j = 0; j < kCols; ++j)
        some_cols[j] = q + j <= cols.last ? Tap<T>{first_x + q + j, x.weights[col * x.bins + q + j]} : Tap<T>{-1, T(0)};
      add_crossings<kRows, kCols>(c, some_rows, some_cols, sum);
    }
  }
}

}  // namespace nasdet::cuda
