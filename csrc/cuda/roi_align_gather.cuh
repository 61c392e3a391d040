// The deterministic form of RoIAlign's gradient: a block owns a tile of a map and some channels, walks the RoIs that reach
// it in the order of their index, keeps the sums in registers and writes every pixel once. No atomics, no zeroed map, no
// sums in memory: beyond the result it needs one small record per RoI.
#pragma once
#include "roi_align_weights.cuh"

namespace nasdet::cuda {

// The pixels that a RoI reaches; level < 0: none.
struct alignas(16) Footprint { int32_t level, image, row0, row1, col0, col1, unused[2]; };

template <class T>
__global__ void __launch_bounds__(kRoiThreads)
    roi_align_footprint_kernel(const __grid_constant__ RoiMaps<T> maps, const T* rois, Footprint* footprints,
                               int64_t count) {
  for (int64_t k = int64_t(blockIdx.x) * kRoiThreads + threadIdx.x; k < count; k += int64_t(gridDim.x) * kRoiThreads) {
    const RoiPlace<T> place = place_of(maps, rois + 5 * k);
    Footprint f{place.empty ? -1 : place.level, int32_t(place.image), 0, -1, 0, -1, {0, 0}};
    if (!place.empty) {
      pixel_extent(place.y, maps.pooled_height, place.height, &f.row0, &f.row1);
      pixel_extent(place.x, maps.pooled_width, place.width, &f.col0, &f.col1);
    }
    footprints[k] = f;
  }
}

// A block's work. NHWC: 8 x 8 pixels, a warp per column, its 32 lanes over groups of kWidth channels. NCHW: 16 x 16 pixels,
// one a thread, for kWidth channels.
template <bool kNhwc> constexpr int kGatherTile = kNhwc ? 8 : 16;
template <bool kNhwc> constexpr int kGatherLanes = kNhwc ? 32 : 1;  // groups of channels in a block
constexpr int kGatherBytes = 24 << 10;                              // of tables, at most
constexpr int kMostHits = 16;                                       // RoIs whose tables are made together

template <class T, bool kNhwc> inline int64_t gather_bytes_per_hit(int64_t pooled_height, int64_t pooled_width) {
  const int64_t y = pooled_height < kBinChunk ? pooled_height : kBinChunk;
  const int64_t x = pooled_width < kBinChunk ? pooled_width : kBinChunk;
  return kGatherTile<kNhwc> * ((y + x) * int64_t(sizeof(T)) + 2 * int64_t(sizeof(BinRange)));
}
template <class T, bool kNhwc> inline int gather_hits(int64_t pooled_height, int64_t pooled_width) {
  const int64_t fitting = kGatherBytes / gather_bytes_per_hit<T, kNhwc>(pooled_height, pooled_width);
  return int(fitting < kMostHits ? fitting : kMostHits);
}

template <bool kNhwc> inline int64_t tiles_of(int64_t images, int64_t height, int64_t width) {
  constexpr int64_t tile = kGatherTile<kNhwc>;
  return images * ((height + tile - 1) / tile) * ((width + tile - 1) / tile);
}

struct Tile { int level, image, row, col; };

template <class T, bool kNhwc> __device__ __forceinline__ Tile tile_at(const RoiMaps<T>& maps, int64_t index) {
  Tile tile{0, 0, 0, 0};
  while (tile.level + 1 < maps.levels && index >= maps.first_tile[tile.level + 1]) ++tile.level;
  index -= maps.first_tile[tile.level];
  const int size = kGatherTile<kNhwc>;
  const int across = (maps.width[tile.level] + size - 1) / size;
  const int down = (maps.height[tile.level] + size - 1) / size;
  tile.col = int(index % across) * size;
  tile.row = int(index / across % down) * size;
  tile.image = int(index / across / down);
  return tile;
}

__device__ __forceinline__ int count_bits(unsigned bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Appends to `found`, in order, the RoIs among base .. base + kRoiThreads - 1 that reach the tile; returns their number.
template <int kTile>
__device__ __forceinline__ int find_hits(const Footprint* footprints, int64_t count, int64_t base, const Tile& tile,
                                         int32_t* found, int* warp_hits) {
  const int64_t k = base + threadIdx.x;
  bool hit = false;
  if (k < count) {
    const Footprint f = footprints[k];
    hit = f.level == tile.level && f.image == tile.image && f.row0 < tile.row + kTile && f.row1 >= tile.row &&
          f.col0 < tile.col + kTile && f.col1 >= tile.col;
  }
  const unsigned votes = __ballot_sync(0xffffffffu, hit);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (lane == 0) warp_hits[warp] = count_bits(votes);
  __syncthreads();
  int before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kRoiThreads / 32; ++w) {
    if (w < warp) before += warp_hits[w];
    total += warp_hits[w];
  }
  if (hit) found[before + count_bits(votes & ((1u << lane) - 1))] = int32_t(k);
  __syncthreads();
  return total;
}

// The tables of `hits` RoIs, one after the other in `memory`, their ranges in `ranges`.
template <class T, int kTile>
__device__ __forceinline__ void fill_tables(const RoiMaps<T>& maps, const T* rois, const int32_t* found, int hits,
                                            const Tile& tile, int first_y, int y_bins, int first_x, int x_bins,
                                            T* memory, BinRange* ranges) {
  const int bins = y_bins + x_bins;
#pragma unroll 1
  for (int t = int(threadIdx.x); t < hits * bins; t += kRoiThreads) {
    const int hit = t / bins, b = t % bins;
    const bool is_y = b < y_bins;
    const int bin = is_y ? b : b - y_bins;
    const RoiPlace<T> place = place_on_level(maps, rois + 5 * int64_t(found[hit]), tile.level);
    T* const table = memory + hit * kTile * bins + (is_y ? 0 : kTile * y_bins);
    fill_weights(axis_of(place, is_y), bin + (is_y ? first_y : first_x), is_y ? place.height : place.width,
                 is_y ? tile.row : tile.col, kTile, is_y ? place.share : T(1), table + bin, is_y ? y_bins : x_bins);
  }
  __syncthreads();
#pragma unroll 1
  for (int t = int(threadIdx.x); t < hits * 2 * kTile; t += kRoiThreads) {
    const int hit = t / (2 * kTile), line = t % kTile;
    const bool is_y = t % (2 * kTile) < kTile;
    const T* table = memory + hit * kTile * bins + (is_y ? 0 : kTile * y_bins);
    ranges[t] = range_of(table + line * (is_y ? y_bins : x_bins), is_y ? y_bins : x_bins);
  }
  __syncthreads();
}

// Block (part, tile): tiles in falling order, so that the coarse levels, whose tiles most RoIs reach, come first. maps.grad
// have the type S. cell_row and cell_col are of a thread's first cell; its others lie below.
template <class S, int kWidth, bool kNhwc>
__global__ void __launch_bounds__(kRoiThreads, 2)
    roi_align_gather_kernel(const __grid_constant__ RoiMaps<arithmetic_t<S>> maps, const arithmetic_t<S>* rois,
                            const Footprint* footprints, const S* grad, int64_t count, int64_t tiles, int most_hits) {
  using T = arithmetic_t<S>;
  constexpr int kTile = kGatherTile<kNhwc>, kLanes = kGatherLanes<kNhwc>, kCells = kTile * kTile * kLanes / kRoiThreads;
  __shared__ int32_t found[2 * kRoiThreads];
  __shared__ int warp_hits[kRoiThreads / 32];
  NASDET_DYNAMIC_SHARED(T, memory);
  const int cell_row = int(threadIdx.x) / (kLanes * kTile), cell_col = int(threadIdx.x) / kLanes % kTile;
  const int channel = (int(blockIdx.x) * kLanes + int(threadIdx.x) % kLanes) * kWidth;
  const bool owner = channel < maps.channels;
#pragma unroll 1
  for (int64_t task = blockIdx.y; task < tiles; task += gridDim.y) {
    const Tile tile = tile_at<T, kNhwc>(maps, tiles - 1 - task);
    T sum[kCells][kWidth] = {};
#pragma unroll 1
    for (int first_y = 0; first_y < maps.pooled_height; first_y += kBinChunk) {
#pragma unroll 1
      for (int first_x = 0; first_x < maps.pooled_width; first_x += kBinChunk) {
        const int y_bins = maps.pooled_height - first_y < kBinChunk ? maps.pooled_height - first_y : kBinChunk;
        const int x_bins = maps.pooled_width - first_x < kBinChunk ? maps.pooled_width - first_x : kBinChunk;
        BinRange* const ranges = reinterpret_cast<BinRange*>(memory + most_hits * kTile * (y_bins + x_bins));
        int pending = 0;
#pragma unroll 1
        for (int64_t base = 0; base < count; base += kRoiThreads) {
          pending += find_hits<kTile>(footprints, count, base, tile, found + pending, warp_hits);
          if (pending <= kRoiThreads && base + kRoiThreads < count) continue;
#pragma unroll 1
          for (int h = 0; h < pending; h += most_hits) {
            const int hits = pending - h < most_hits ? pending - h : most_hits;
            fill_tables<T, kTile>(maps, rois, found + h, hits, tile, first_y, y_bins, first_x, x_bins, memory, ranges);
#pragma unroll 1
            for (int i = 0; i < (owner ? hits : 0); ++i) {
              T* const table = memory + i * kTile * (y_bins + x_bins);
              const AxisTable<T> y{table, ranges + i * 2 * kTile, y_bins},
                  x{table + kTile * y_bins, ranges + (i * 2 + 1) * kTile, x_bins};
              const auto c = channels_of<kWidth, kNhwc>(grad, int64_t(found[h + i]), maps.channels, maps.pooled_height,
                                                        maps.pooled_width, channel);
#pragma unroll
              for (int cell = 0; cell < kCells; ++cell)
                add_bins<kNhwc ? 2 : 1, kNhwc ? 2 : 1>(c, y, cell_row + cell, first_y, x, cell_col, first_x, sum[cell]);
            }
            __syncthreads();  // before the next tables
          }
          pending = 0;
        }
      }
    }
#pragma unroll
    for (int cell = 0; cell < kCells; ++cell) {
      const int row = tile.row + cell_row + cell, col = tile.col + cell_col;
      const int height = maps.height[tile.level], width = maps.width[tile.level];
      if (owner && row < height && col < width)
        store(channels_of<kWidth, kNhwc>(static_cast<S*>(maps.grad[tile.level]), tile.image, maps.channels, height,
                                         width, channel),
              row, col, sum[cell]);
    }
  }
}

}  // namespace nasdet::cuda
