// The fast form of RoIAlign's gradient: a block owns channels of one RoI, sums what its bins send to each pixel, and adds
// that to the map with one atomic operation: one per pixel, not four per sample. The order between RoIs is not fixed.
#pragma once
#include "roi_align_weights.cuh"

namespace nasdet::cuda {

constexpr int kScatterTile = 16;  // rows and columns of the pixels that share a table

template <class T> inline int64_t scatter_bytes(int64_t pooled_height, int64_t pooled_width) {
  const int64_t y = pooled_height < kBinChunk ? pooled_height : kBinChunk;
  const int64_t x = pooled_width < kBinChunk ? pooled_width : kBinChunk;
  return kScatterTile * ((y + x) * int64_t(sizeof(T)) + 2 * int64_t(sizeof(BinRange)));
}

template <int kWidth, bool kNhwc, class T>
__device__ __forceinline__ void atomic_add(const Channels<T, kWidth, kNhwc>& c, int row, int col,
                                           const T (&v)[kWidth]) {
  T* at = c.at(row, col);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kFour = kNhwc && kWidth == 4 && sizeof(T) == 4;
#else
  constexpr bool kFour = false;
#endif
  if constexpr (kFour) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "f"(v[0]),
                 "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
#endif
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      if (kNhwc || e < c.there) atomicAdd(at + e * (kNhwc ? 1 : c.plane_step), v[e]);
  }
}

// The tables of the bins from (first_y, first_x) for the tile of pixels at (row, col).
template <class T>
__device__ __forceinline__ void fill_scatter_tables(const RoiPlace<T>& place, int first_y, int first_x, int row,
                                                    int col, AxisTable<T> y, AxisTable<T> x) {
  for (int b = int(threadIdx.x); b < y.bins + x.bins; b += kRoiThreads) {
    const bool is_y = b < y.bins;
    const int bin = is_y ? b : b - y.bins;
    fill_weights(axis_of(place, is_y), bin + (is_y ? first_y : first_x), is_y ? place.height : place.width,
                 is_y ? row : col, kScatterTile, is_y ? place.share : T(1), (is_y ? y.weights : x.weights) + bin,
                 is_y ? y.bins : x.bins);
  }
  __syncthreads();
  if (threadIdx.x < 2 * kScatterTile) {
    const int line = int(threadIdx.x) % kScatterTile, bins = threadIdx.x < kScatterTile ? y.bins : x.bins;
    y.ranges[threadIdx.x] = range_of((threadIdx.x < kScatterTile ? y.weights : x.weights) + line * bins, bins);
  }
  __syncthreads();
}

// Block (part, k): `share` groups of kWidth channels of RoI k, k + gridDim.y, ... `grad` is [rois, PH, PW, C] (kNhwc) or
// [rois, C, PH, PW]; maps.grad hold sums in the arithmetic's type, zero at the start.
template <class S, int kWidth, bool kNhwc>
__global__ void __launch_bounds__(kRoiThreads, sizeof(S) == 8 ? 2 : 3)
    roi_align_scatter_kernel(const __grid_constant__ RoiMaps<arithmetic_t<S>> maps, const arithmetic_t<S>* rois,
                             const S* grad, int64_t count, int share) {
  using T = arithmetic_t<S>;
  __shared__ RoiPlace<T> place;
  __shared__ int row0, row1, col0, col1;
  NASDET_DYNAMIC_SHARED(T, memory);
  const int all_groups = (maps.channels + kWidth - 1) / kWidth, first = int(blockIdx.x) * share;
  const int groups = first + share < all_groups ? share : all_groups - first;
#pragma unroll 1
  for (int64_t k = blockIdx.y; k < count; k += gridDim.y) {
    if (threadIdx.x == 0) {
      place = place_of(maps, rois + 5 * k);
      row0 = col0 = 0, row1 = col1 = -1;
      if (!place.empty) {
        pixel_extent(place.y, maps.pooled_height, place.height, &row0, &row1);
        pixel_extent(place.x, maps.pooled_width, place.width, &col0, &col1);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int first_y = 0; first_y < maps.pooled_height; first_y += kBinChunk) {
#pragma unroll 1
      for (int first_x = 0; first_x < maps.pooled_width; first_x += kBinChunk) {
        const int y_bins = maps.pooled_height - first_y < kBinChunk ? maps.pooled_height - first_y : kBinChunk;
        const int x_bins = maps.pooled_width - first_x < kBinChunk ? maps.pooled_width - first_x : kBinChunk;
        BinRange* const ranges = reinterpret_cast<BinRange*>(memory + kScatterTile * (y_bins + x_bins));
        const AxisTable<T> y{memory, ranges, y_bins}, x{memory + kScatterTile * y_bins, ranges + kScatterTile, x_bins};
#pragma unroll 1
        for (int row = row0; row <= row1; row += kScatterTile) {
#pragma unroll 1
          for (int col = col0; col <= col1; col += kScatterTile) {
            fill_scatter_tables(place, first_y, first_x, row, col, y, x);
            const int height = row1 - row + 1 < kScatterTile ? row1 - row + 1 : kScatterTile;
            const int width = col1 - col + 1 < kScatterTile ? col1 - col + 1 : kScatterTile;
#pragma unroll 1
            for (int item = int(threadIdx.x); item < height * width * groups; item += kRoiThreads) {
              const int pixel = kNhwc ? item / groups : item % (height * width);
              const int group = kNhwc ? item % groups : item / (height * width);
              const int i = pixel / width, j = pixel % width, channel = (first + group) * kWidth;
              if (y.ranges[i].last < y.ranges[i].first || x.ranges[j].last < x.ranges[j].first) continue;
              T sum[kWidth] = {};
              add_bins<kNhwc ? 2 : 1, 2>(
                  channels_of<kWidth, kNhwc>(grad, k, maps.channels, maps.pooled_height, maps.pooled_width, channel), y,
                  i, first_y, x, j, first_x, sum);
              atomic_add(channels_of<kWidth, kNhwc>(static_cast<T*>(maps.grad[place.level]), place.image, maps.channels,
                                                    place.height, place.width, channel),
                         row + i, col + j, sum);
            }
            __syncthreads();  // before the next table
          }
        }
      }
    }
    __syncthreads();  // before the next RoI's place
  }
}

// The sums of the 16-bit maps in the maps' type: blockIdx.y is the level.
struct RoiSums {
  const float* from[kMaxLevels];
  void* to[kMaxLevels];
  int64_t count[kMaxLevels];
};
constexpr int kRoundPack = 4;

template <class S>
__global__ void __launch_bounds__(kRoiThreads) roi_align_round_kernel(const __grid_constant__ RoiSums sums) {
  const float* from = sums.from[blockIdx.y];
  S* to = static_cast<S*>(sums.to[blockIdx.y]);
  const int64_t count = sums.count[blockIdx.y], packs = count / kRoundPack, threads = int64_t(gridDim.x) * kRoiThreads;
  const int64_t thread = int64_t(blockIdx.x) * kRoiThreads + threadIdx.x;
  for (int64_t i = thread; i < packs; i += threads) {
    const Pack<float, kRoundPack> wide = reinterpret_cast<const Pack<float, kRoundPack>*>(from)[i];
    Pack<S, kRoundPack> rounded;
#pragma unroll
    for (int e = 0; e < kRoundPack; ++e) rounded.v[e] = narrow<S>(wide.v[e]);
    reinterpret_cast<Pack<S, kRoundPack>*>(to)[i] = rounded;
  }
  if (packs * kRoundPack + thread < count)
    to[packs * kRoundPack + thread] = narrow<S>(from[packs * kRoundPack + thread]);
}

}  // namespace nasdet::cuda
