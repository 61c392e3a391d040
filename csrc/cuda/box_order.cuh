// Sorts the boxes of a batch by score, and by class and score, with ranks that blocks count on their own: no block waits for
// another, whole batches share a launch, and nothing is read back. No torch and no runtime header: tests run this file on the CPU.
//
// order_runs_kernel counts, for every box, the boxes of its run that come before it: with one run per image that is the order.
// Otherwise merge_runs_kernel joins up to kMaxFan runs a launch: an element's new place is the sum of its places in all of them.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "nasdet/boxes.h"

namespace nasdet::cuda {

constexpr int kSortThreads = 512;                // of a block, at most; at least 64
constexpr int kPiece = 32;                       // elements that a block places
constexpr uint32_t kRun = 512, kMaxFan = 64;     // elements of a first run; runs that a launch merges
constexpr int64_t kOneRunPairs = 1 << 24;        // up to so many comparisons a batch is sorted by counting alone
constexpr int kTile = 128, kWords = kTile / 32;  // boxes that one block of the suppression decides
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int bits_in(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}
__device__ __forceinline__ int highest_bit(uint32_t word) {  // of a word that is not 0
#ifdef __CUDA_ARCH__
  return 31 - __clz(int(word));
#else
  return 31 - __builtin_clz(word);
#endif
}
__device__ __forceinline__ uint32_t bits_below(int bit) { return bit >= 32 ? ~0u : (1u << bit) - 1; }  // 0 <= bit

// The first place in sorted[low, high) that is not below `wanted` (kAfter: that is above it), else high. All lanes of a warp take
// part: one probe per lane and step.
template <bool kAfter>
__device__ __forceinline__ int64_t class_bound(const int64_t* sorted, int64_t low, int64_t high, int64_t wanted) {
  const int lane = int(threadIdx.x) % 32;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, at = low + lane * step;
    const int below =
        bits_in(__ballot_sync(kAllLanes, at < high && (kAfter ? sorted[at] <= wanted : sorted[at] < wanted)));
    if (below == 0) break;
    const int64_t next = low + below * step;
    low = next - step + 1;
    high = next < high ? next : high;
  }
  return low;
}

// The inputs, read where they are: any strides, float32, float64, bfloat16 or half. Storage codes are those of checks.h.
struct BoxSource {
  const void* boxes;
  const void* scores;
  const int64_t* classes;                                                                  // null: one class
  int64_t box_image, box_row, box_column, score_image, score_row, class_image, class_row;  // strides in elements
  int64_t images, count;  // count: boxes of one image, 1 <= images * count < 2^31
  int32_t storage;        // of boxes and scores
};

template <class T> struct alignas(16) BoxCell { Box<T> box; };

// What the sort makes, all arrays [images, count] unless said otherwise. Without classes positions are ranks, and
// rank_of, index_of and classes are null.
template <class T> struct Sorted {
  uint32_t* order;             // [rank] -> index
  uint32_t* rank_of;           // [index] -> rank
  uint32_t* index_of;          // [position], in order of class and score -> index
  int64_t* classes;            // [position]
  BoxCell<T>* boxes;           // [position]; null: only the order is wanted
  unsigned long long* words;   // [images, tiles, kWords]: what of a tile is kept, once it is known
  uint32_t* kept;              // [images, tiles, kWords]: bits by rank
  unsigned long long* counts;  // [images]
  unsigned* ticket;            // [1]
  int64_t tiles;
};

template <class T> __device__ __forceinline__ T load_as(const void* data, int32_t storage, int64_t at) {
  switch (storage) {
    case 0:
      return T(static_cast<const float*>(data)[at]);
    case 1:
      return T(static_cast<const double*>(data)[at]);
    case 2:
      return T(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]));
    default:
      return T(__half2float(static_cast<const __half*>(data)[at]));
  }
}

// Unique within an image: score descending, then index.
template <class T> struct ScoreKey;
template <> struct ScoreKey<float> {
  uint64_t bits;
  __device__ __forceinline__ static ScoreKey of(uint32_t score, uint32_t index) {
    return {uint64_t(score) << 32 | index};
  }
  __device__ __forceinline__ uint32_t index() const { return uint32_t(bits); }
};
template <> struct ScoreKey<double> {
  uint64_t score;
  uint64_t at;
  __device__ __forceinline__ static ScoreKey of(uint64_t score, uint32_t index) { return {score, index}; }
  __device__ __forceinline__ uint32_t index() const { return uint32_t(at); }
};
template <class T> struct ClassKey {
  int64_t of_class;
  ScoreKey<T> key;
  __device__ __forceinline__ uint32_t index() const { return key.index(); }
};

__device__ __forceinline__ bool before(const ScoreKey<float>& a, const ScoreKey<float>& b) { return a.bits < b.bits; }
__device__ __forceinline__ bool before(const ScoreKey<double>& a, const ScoreKey<double>& b) {
  return a.score < b.score || (a.score == b.score && a.at < b.at);
}
template <class T> __device__ __forceinline__ bool before(const ClassKey<T>& a, const ClassKey<T>& b) {
  return a.of_class < b.of_class || (a.of_class == b.of_class && before(a.key, b.key));
}

// Two copies of the sequences under way: a launch reads one and writes the other.
template <class T> struct Runs {
  ScoreKey<T>* by_score;
  ClassKey<T>* by_class;
};

template <class T>
__device__ __forceinline__ ScoreKey<T> key_of(const BoxSource& source, int64_t image, int64_t index) {
  const T score = load_as<T>(source.scores, source.storage, image * source.score_image + index * source.score_row);
  return ScoreKey<T>::of(descending_key(score), uint32_t(index));
}

template <class T>
__device__ __forceinline__ void place_box(const BoxSource& source, const Sorted<T>& sorted, int64_t image,
                                          int64_t position, int64_t index) {
  if (!sorted.boxes) return;
  const int64_t at = image * source.box_image + index * source.box_row;
  BoxCell<T> cell;
  cell.box.x1 = load_as<T>(source.boxes, source.storage, at);
  cell.box.y1 = load_as<T>(source.boxes, source.storage, at + source.box_column);
  cell.box.x2 = load_as<T>(source.boxes, source.storage, at + 2 * source.box_column);
  cell.box.y2 = load_as<T>(source.boxes, source.storage, at + 3 * source.box_column);
  sorted.boxes[image * source.count + position] = cell;
}

// An element has found its last place.
template <class T>
__device__ __forceinline__ void place(const BoxSource& source, const Sorted<T>& sorted, int64_t image, int64_t rank,
                                      const ScoreKey<T>& key) {
  const int64_t first = image * source.count, index = key.index();
  sorted.order[first + rank] = uint32_t(index);
  if (sorted.rank_of) sorted.rank_of[first + index] = uint32_t(rank);
  else place_box(source, sorted, image, rank, index);
}
template <class T>
__device__ __forceinline__ void place(const BoxSource& source, const Sorted<T>& sorted, int64_t image, int64_t position,
                                      const ClassKey<T>& key) {
  const int64_t first = image * source.count, index = key.index();
  sorted.index_of[first + position] = uint32_t(index);
  sorted.classes[first + position] = key.of_class;
  place_box(source, sorted, image, position, index);
}

// The later kernels count up from zero.
template <class T> __device__ __forceinline__ void clear(const BoxSource& source, const Sorted<T>& sorted) {
  const int64_t start = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  if (start == 0 && sorted.ticket) *sorted.ticket = 0;
  if (sorted.counts)
    for (int64_t i = start; i < source.images; i += step) sorted.counts[i] = 0;
  if (!sorted.words) return;
  for (int64_t i = start; i < source.images * sorted.tiles * kWords; i += step) sorted.words[i] = 0, sorted.kept[i] = 0;
}

// run: elements of a run, a multiple of kPiece, or all of an image; then this kernel places them itself.
template <class T>
__global__ void __launch_bounds__(kSortThreads, 2)
    order_runs_kernel(const __grid_constant__ BoxSource source, const __grid_constant__ Sorted<T> sorted,
                      const __grid_constant__ Runs<T> out, uint32_t run) {
  __shared__ ScoreKey<T> keys[kSortThreads];
  __shared__ int64_t classes[kSortThreads];
  __shared__ uint32_t places[2][kPiece];
  clear(source, sorted);
  const uint32_t count = uint32_t(source.count), pieces = (count + kPiece - 1) / kPiece;
  const int64_t image = blockIdx.x / pieces;
  const uint32_t first = blockIdx.x % pieces * kPiece, run_begin = first / run * run;
  const uint32_t run_end = run < count - run_begin ? run_begin + run : count;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const bool present = first + lane < count, by_class = source.classes != nullptr;
  const int64_t index = present ? first + lane : first;
  ClassKey<T> mine;
  mine.key = key_of<T>(source, image, index);
  mine.of_class = by_class ? source.classes[image * source.class_image + index * source.class_row] : 0;
  if (threadIdx.x < kPiece) places[0][threadIdx.x] = places[1][threadIdx.x] = 0;

  uint32_t score_place = 0, class_place = 0;
  for (uint32_t chunk = run_begin; chunk < run_end; chunk += blockDim.x) {
    __syncthreads();
    if (const int64_t i = chunk + threadIdx.x; i < run_end) {
      keys[threadIdx.x] = key_of<T>(source, image, i);
      classes[threadIdx.x] = by_class ? source.classes[image * source.class_image + i * source.class_row] : 0;
    }
    __syncthreads();
    const uint32_t left = run_end - chunk;
    const int end = left < uint32_t(warp + 1) * 32 ? int(left) : (warp + 1) * 32;
#pragma unroll 4
    for (int e = warp * 32; e < end; ++e) {
      const bool sooner = before(keys[e], mine.key);
      const int64_t other = classes[e];
      score_place += sooner;
      class_place += other < mine.of_class || (other == mine.of_class && sooner);
    }
  }
  atomicAdd(&places[0][lane], score_place);
  atomicAdd(&places[1][lane], class_place);
  __syncthreads();
  if (warp >= (by_class ? 2 : 1) || !present) return;
  const uint32_t at = run_begin + places[warp][lane];
  if (run >= count) {
    if (warp == 0) place(source, sorted, image, at, mine.key);
    else place(source, sorted, image, at, mine);
  } else {
    if (warp == 0) out.by_score[image * count + at] = mine.key;
    else out.by_class[image * count + at] = mine;
  }
}

template <class K> __device__ __forceinline__ uint32_t count_before(const K* run, uint32_t length, const K& key) {
  uint32_t low = 0;
  while (length > 0) {
    const uint32_t half = length / 2;
    const bool sooner = before(run[low + half], key);
    low = sooner ? low + half + 1 : low;
    length = sooner ? length - half - 1 : half;
  }
  return low;
}

template <class T, class K>
__device__ __forceinline__ void merge_runs(const BoxSource& source, const Sorted<T>& sorted, const K* in, K* out,
                                           uint32_t run, uint32_t fan, uint32_t* places) {
  const uint32_t count = uint32_t(source.count), pieces = (count + kPiece - 1) / kPiece, span = run * fan;
  const int64_t image = blockIdx.x / pieces;
  const uint32_t first = blockIdx.x % pieces * kPiece, begin = first / span * span;
  const uint32_t end = span < count - begin ? begin + span : count, own = (first - begin) / run;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const bool present = first + lane < count;
  in += image * count;
  const K mine = in[present ? first + lane : first];
  if (threadIdx.x < kPiece) places[threadIdx.x] = first + lane - begin - own * run;
  __syncthreads();
  uint32_t sum = 0;
  const uint32_t runs = (end - begin - 1) / run + 1;
  for (uint32_t r = warp; r < runs; r += blockDim.x / 32) {
    const uint32_t start = begin + r * run, length = end - start < run ? end - start : run;
    if (r != own) sum += count_before(in + start, length, mine);
  }
  atomicAdd(&places[lane], sum);
  __syncthreads();
  if (warp > 0 || !present) return;
  const uint32_t at = begin + places[lane];
  if (span >= count) place(source, sorted, image, at, mine);
  else out[image * count + at] = mine;
}

// Block row 0 merges by score, row 1 by class. run: elements of each sorted run, a multiple of kPiece; fan: at most as many as
// there are, so that run * fan < 2^32.
template <class T>
__global__ void __launch_bounds__(kSortThreads, 2)
    merge_runs_kernel(const __grid_constant__ BoxSource source, const __grid_constant__ Sorted<T> sorted,
                      const __grid_constant__ Runs<T> in, const __grid_constant__ Runs<T> out, uint32_t run,
                      uint32_t fan) {
  __shared__ uint32_t places[kPiece];
  if (blockIdx.y == 0) merge_runs(source, sorted, in.by_score, out.by_score, run, fan, places);
  else merge_runs(source, sorted, in.by_class, out.by_class, run, fan, places);
}

}  // namespace nasdet::cuda
