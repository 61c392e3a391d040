// Greedy suppression of boxes that box_order.cuh has sorted, and the list of what is kept. Nothing is read back and no matrix of
// pairs is stored. No torch and no runtime header: tests compile this file with g++ and run it on the CPU.
//
// A block decides one tile of kTile boxes. It compares them with what earlier tiles of the same class keep, tile by tile as
// those become known, then decides its own boxes by bit operations in one warp and makes them known. Tiles are handed out in
// order, so a block waits only for blocks that run already: no block barrier across the grid, and no deadlock.
#pragma once
#include "box_order.cuh"

namespace nasdet::cuda {

constexpr int kNmsThreads = 256, kNmsWarps = kNmsThreads / 32;
constexpr unsigned long long kKnown = 1ull << 32;  // beside a word's 32 bits: no fence is needed to read both at once

// Exactly `IoU > threshold`; most pairs do not touch, and then only a negative threshold or NaN could matter: 0 / u is 0 or NaN.
template <class T>
__device__ __forceinline__ bool suppresses(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T threshold) {
  const T intersection = intersection_area(a, b);
  if (intersection == T(0) && threshold >= T(0)) return false;
  return rounded_quotient(intersection, (area_a + area_b) - intersection) > threshold;
}

// Boxes of a list in shared memory, with their areas.
template <class T> struct BoxList {
  const BoxCell<T>* cells;
  const T* areas;
};

constexpr int kRows = 2;  // boxes of the tile that a lane compares: 64 a warp
template <class T> struct Rows {
  Box<T> box[kRows];
  T area[kRows];
};

// Which entries [begin, end) of a list, end <= 32, overlap each of the lane's boxes.
template <class T>
__device__ __forceinline__ void compare(const BoxList<T>& list, int begin, int end, const Rows<T>& rows, T threshold,
                                        uint32_t (&hits)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) hits[r] = 0;
#pragma unroll(sizeof(T) == 8 ? 1 : 4)
  for (int e = begin; e < end; ++e) {
    const Box<T> other = list.cells[e].box;
    const T area = list.areas[e];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      hits[r] |= uint32_t(suppresses(other, area, rows.box[r], rows.area[r], threshold)) << e;
  }
}

// Where the class of the tile's box i begins, -1: before the tile. heads: bit i marks a box whose class differs from the last.
__device__ __forceinline__ int class_begin(const uint32_t (&heads)[kWords], int i) {
  for (int w = i / 32; w >= 0; --w) {
    const uint32_t word = heads[w] & (w == i / 32 ? bits_below(i % 32 + 1) : ~0u);
    if (word) return w * 32 + highest_bit(word);
  }
  return -1;
}

template <class T> struct TileStorage {
  BoxCell<T> own[kTile], last[kTile], list[kNmsWarps][32];
  T own_areas[kTile], last_areas[kTile], list_areas[kNmsWarps][32];
  uint32_t own_hits[kWords][kTile],
      last_hits[kWords][kTile];  // [w][i]: boxes of word w, of this and the last tile, that would drop box i
  uint32_t ranks[kTile];
  uint32_t heads[kWords];
  uint32_t dropped[kWords][kWords];  // [w]: by boxes of the words w of earlier tiles
  unsigned ticket;
};

// One tile of an image; positions are those of the image.
struct TileAt {
  int64_t image, tile, first;
  int count;            // boxes of this tile
  int64_t class_first;  // where the class of its first box begins: before `first` if the class spans tiles
  bool spans;
};

template <class T>
__device__ __forceinline__ void load_tile(const Sorted<T>& sorted, int64_t count, const TileAt& at,
                                          TileStorage<T>& shared) {
  const int i = int(threadIdx.x) % kTile;
  const bool own = threadIdx.x < kTile;
  const int64_t position = at.first + i - (own ? 0 : kTile), place = at.image * count + position;
  BoxCell<T> cell{};
  if (position >= 0 && position < count) cell = sorted.boxes[place];
  (own ? shared.own : shared.last)[i] = cell;
  (own ? shared.own_areas : shared.last_areas)[i] = box_area(cell.box);
  if (!own) return;
  bool head = position == 0;
  if (sorted.classes && position > 0 && position < count) head = sorted.classes[place] != sorted.classes[place - 1];
  const uint32_t word = __ballot_sync(kAllLanes, head);
  if (i % 32 == 0) shared.heads[i / 32] = word;
  if (i < at.count)
    shared.ranks[i] = sorted.rank_of ? sorted.rank_of[at.image * count + sorted.index_of[place]] : uint32_t(position);
}

// What the boxes of this tile, and of the last one if the class spans it, would do to this tile's boxes: before anything is known.
template <class T>
__device__ __forceinline__ void compare_near(const TileAt& at, const Rows<T>& rows, int row, int word, T threshold,
                                             TileStorage<T>& shared) {
  const int lane = int(threadIdx.x) % 32;
  int begin[kRows];
  uint32_t hits[kRows], wanted[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {  // earlier boxes of the same class
    const int i = row + 32 * r + lane, from = class_begin(shared.heads, i) - 32 * word, to = i - 32 * word;
    begin[r] = from;
    wanted[r] = i < at.count && to > 0 ? bits_below(to) & (from > 31 ? 0 : ~bits_below(from > 0 ? from : 0)) : 0;
  }
  const bool any = __any_sync(kAllLanes, (wanted[0] | wanted[1]) != 0);
#pragma unroll
  for (int r = 0; r < kRows; ++r) hits[r] = 0;
  if (any) compare<T>({shared.own + 32 * word, shared.own_areas + 32 * word}, 0, 32, rows, threshold, hits);
#pragma unroll
  for (int r = 0; r < kRows; ++r) shared.own_hits[word][row + 32 * r + lane] = hits[r] & wanted[r];
  if (!at.spans) return;
  const int64_t from = at.class_first - (at.first - kTile) - 32 * word;
  const uint32_t same_class = from >= 32 ? 0 : ~bits_below(from > 0 ? int(from) : 0);
#pragma unroll
  for (int r = 0; r < kRows; ++r) hits[r] = 0;
  if (same_class && __any_sync(kAllLanes, begin[0] + 32 * word < 0 || begin[1] + 32 * word < 0))
    compare<T>({shared.last + 32 * word, shared.last_areas + 32 * word}, 0, 32, rows, threshold, hits);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    shared.last_hits[word][row + 32 * r + lane] = begin[r] + 32 * word < 0 ? hits[r] & same_class : 0;
}

__device__ __forceinline__ unsigned long long peek(const unsigned long long* word) {
  return *const_cast<const volatile unsigned long long*>(word);
}

// Compares with the boxes that the tiles before the last one keep, as soon as each is known. Every warp takes one word of each
// tile and half of this tile's boxes: it waits for nobody but that word.
template <class T>
__device__ __forceinline__ void compare_far(const Sorted<T>& sorted, int64_t count, const TileAt& at,
                                            const Rows<T>& rows, int row, int word, T threshold,
                                            TileStorage<T>& shared) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  bool alive[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    alive[r] = row + 32 * r + lane < at.count && class_begin(shared.heads, row + 32 * r + lane) < 0;
  const BoxCell<T>* cells = sorted.boxes + at.image * count + 32 * word + lane;
  const unsigned long long* words = sorted.words + at.image * sorted.tiles * kWords + word;
  for (int64_t tile = at.class_first / kTile; tile < at.tile - 1; ++tile) {
    if (!__any_sync(kAllLanes, alive[0] || alive[1])) break;
    const BoxCell<T> cell = cells[tile * kTile];
    unsigned long long known;
    do known = peek(words + tile * kWords);
    while (!(known & kKnown));
    const int64_t from = at.class_first - tile * kTile - 32 * word;
    const uint32_t kept = uint32_t(known) & (from >= 32 ? 0 : ~bits_below(from > 0 ? int(from) : 0));
    if (!kept) continue;
    if (kept >> lane & 1) {
      const int place = bits_in(kept & bits_below(lane));
      shared.list[warp][place] = cell;
      shared.list_areas[warp][place] = box_area(cell.box);
    }
    __syncwarp();
    uint32_t hits[kRows];
    compare<T>({shared.list[warp], shared.list_areas[warp]}, 0, bits_in(kept), rows, threshold, hits);
#pragma unroll
    for (int r = 0; r < kRows; ++r) alive[r] = alive[r] && !hits[r];
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {  // a box whose class begins in this tile was never alive here: it is not dropped
    const int i = row + 32 * r + lane;
    const uint32_t dropped = __ballot_sync(kAllLanes, !alive[r] && i < at.count && class_begin(shared.heads, i) < 0);
    if (lane == 0) shared.dropped[word][row / 32 + r] = dropped;
  }
}

// Decides the tile in one warp and returns its kept boxes. In word after word: a box is kept once no earlier box that overlaps
// it is open, and dropped once one is kept; the first open box is always kept, so each round decides one at least.
template <class T>
__device__ __forceinline__ void decide(const Sorted<T>& sorted, const TileAt& at, const TileStorage<T>& shared,
                                       uint32_t (&kept)[kWords]) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t last[kWords] = {};
  if (at.spans) {
    const unsigned long long* words = sorted.words + (at.image * sorted.tiles + at.tile - 1) * kWords;
    unsigned long long known;
    do known = peek(words + lane % kWords);
    while (__any_sync(kAllLanes, !(known & kKnown)));
#pragma unroll
    for (int w = 0; w < kWords; ++w) last[w] = __shfl_sync(kAllLanes, uint32_t(known), w);
  }
#pragma unroll
  for (int q = 0; q < kWords; ++q) {
    const int i = 32 * q + lane;
    uint32_t hit = 0, dropped = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (at.spans) hit |= shared.last_hits[w][i] & last[w], dropped |= shared.dropped[w][q];
      if (w < q) hit |= shared.own_hits[w][i] & kept[w];
    }
    const uint32_t overlapping = shared.own_hits[q][i];
    bool undecided = i < at.count && !hit && !(dropped >> lane & 1);
    uint32_t open = __ballot_sync(kAllLanes, undecided), chosen = 0;
    while (open) {
      const bool keep = undecided && !(overlapping & open);
      chosen |= __ballot_sync(kAllLanes, keep);
      undecided = undecided && !keep && !(overlapping & chosen);
      open = __ballot_sync(kAllLanes, undecided);
    }
    kept[q] = chosen;
  }
}

template <class T>
__device__ __forceinline__ void publish(const Sorted<T>& sorted, const TileAt& at, const TileStorage<T>& shared,
                                        const uint32_t (&kept)[kWords]) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t own = kept[0];
#pragma unroll
  for (int w = 1; w < kWords; ++w) own = lane == w ? kept[w] : own;
  if (lane < kWords) {
    volatile unsigned long long* words = sorted.words + (at.image * sorted.tiles + at.tile) * kWords;
    words[lane] = kKnown | own;
  }
  int total = 0;
  uint32_t* bits = sorted.kept + at.image * sorted.tiles * kWords;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    total += bits_in(kept[w]);
    if (!(kept[w] >> lane & 1)) continue;
    const uint32_t rank = shared.ranks[32 * w + lane];
    atomicAdd(bits + rank / 32, 1u << rank % 32);  // every rank comes once: the sum of the bits is their union
  }
  if (lane == 0) atomicAdd(sorted.counts + at.image, static_cast<unsigned long long>(total));
}

template <class T>
__global__ void __launch_bounds__(kNmsThreads)
    suppress_kernel(const __grid_constant__ Sorted<T> sorted, int64_t images, int64_t count, T threshold) {
  __shared__ TileStorage<T> shared;
  if (threadIdx.x == 0) shared.ticket = atomicAdd(sorted.ticket, 1u);
  __syncthreads();
  TileAt at;
  at.image = shared.ticket % images;
  at.tile = shared.ticket / images;
  at.first = at.tile * kTile;
  at.count = count - at.first < kTile ? int(count - at.first) : kTile;
  load_tile(sorted, count, at, shared);
  __syncthreads();
  at.spans = !(shared.heads[0] & 1);
  at.class_first = at.first;
  if (at.spans) {
    const int64_t* classes = sorted.classes ? sorted.classes + at.image * count : nullptr;
    at.class_first = classes ? class_bound<false>(classes, 0, at.first, classes[at.first]) : 0;
  }
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int word = warp / 2, row = warp % 2 * 64;
  Rows<T> rows;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    rows.box[r] = shared.own[row + 32 * r + lane].box, rows.area[r] = shared.own_areas[row + 32 * r + lane];
  compare_near(at, rows, row, word, threshold, shared);
  if (at.spans) compare_far(sorted, count, at, rows, row, word, threshold, shared);
  __syncthreads();
  if (warp != 0) return;
  uint32_t kept[kWords];
  decide(sorted, at, shared, kept);
  publish(sorted, at, shared, kept);
}

constexpr int kListThreads = 256, kListWords = 64, kListRanks = 32 * kListWords;

// Lists the kept boxes by rank: the indices in order of descending score. Each block counts what is kept before its ranks.
// index: [images, places], the places beyond the count -1; used: [images] or null, how many are filled.
__global__ void __launch_bounds__(kListThreads)
    list_kept_kernel(const uint32_t* order, const uint32_t* kept, const unsigned long long* counts, int64_t count,
                     int64_t words, int64_t blocks, int64_t places, int64_t* index, int64_t* used) {
  __shared__ uint32_t chunk[kListWords];
  __shared__ int64_t sums[kListThreads / 32];
  const int64_t image = blockIdx.x / blocks, block = blockIdx.x - image * blocks;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  kept += image * words, order += image * count, index += image * places;
  int64_t sum = 0;
  for (int64_t w = threadIdx.x; w < block * kListWords; w += kListThreads) sum += bits_in(kept[w]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (lane == 0) sums[warp] = sum;
  if (threadIdx.x < kListWords)
    chunk[threadIdx.x] = block * kListWords + threadIdx.x < words ? kept[block * kListWords + threadIdx.x] : 0;
  __syncthreads();
  int64_t place = 0;
  for (int w = 0; w < kListThreads / 32; ++w) place += sums[w];
  constexpr int kPerWarp = kListWords / (kListThreads / 32);
  for (int w = 0; w < warp * kPerWarp; ++w) place += bits_in(chunk[w]);
  for (int w = warp * kPerWarp; w < (warp + 1) * kPerWarp; ++w) {
    const uint32_t word = chunk[w];
    const int64_t at = place + bits_in(word & bits_below(lane));
    if ((word >> lane & 1) && at < places) index[at] = order[(block * kListWords + w) * 32 + lane];
    place += bits_in(word);
  }
  const int64_t total = int64_t(counts[image]), filled = total < places ? total : places;
  for (int64_t p = filled + block * kListThreads + threadIdx.x; p < places; p += blocks * kListThreads) index[p] = -1;
  if (used && block == 0 && threadIdx.x == 0) used[image] = filled;
}

}  // namespace nasdet::cuda
