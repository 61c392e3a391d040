// Soft-NMS of boxes that box_order.cuh has sorted by class: a block selects the boxes of one class one after another, and lowers
// the others' scores in the same sweep that finds the next. n boxes of a class take n sweeps of n / blockDim.x boxes a thread,
// with one barrier each. No torch and no runtime header: tests compile this file with g++ and run it on the CPU.
#pragma once
#include "box_order.cuh"

namespace nasdet::cuda {

constexpr int kSoftThreads = 512, kSoftWarps = kSoftThreads / 32;  // of a block, at most
constexpr int kSoftPiece = 32;  // positions: the classes that begin there are one block's
constexpr int kLinear = 0, kGaussian = 1, kNaive = 2;
constexpr uint32_t kOut = 1u << 31, kNobody = ~0u;

template <class T> struct SoftSettings {
  T threshold, sigma, min_score;
  int32_t method;
  bool whole;  // one block goes over all classes: selections come in their order, whatever the signs of the scores
};

// Arrays of one element per box.
template <class T> struct SoftState {
  const void* scores;  // the input, read at index * score_row
  int64_t score_row;
  int32_t storage;
  T* score;          // [position]
  uint32_t* state;   // [position]: index, and kOut once the box is selected or below the lowest score
  T* lowered;        // [index]: the score at its selection, -infinity for what is not selected
  uint32_t* chosen;  // [step] -> index; written if settings.whole
};

__device__ __forceinline__ float exponential(float v) {
#ifdef __CUDA_ARCH__
  return expf(v);
#else
  return __builtin_expf(v);
#endif
}
__device__ __forceinline__ double exponential(double v) {
#ifdef __CUDA_ARCH__
  return exp(v);
#else
  return __builtin_exp(v);
#endif
}

// The score of a box after `best` was selected. An IoU of 0/0 leaves it as it is; infinity times 0 is 0.
template <class T>
__device__ __forceinline__ T lowered_score(const SoftSettings<T>& settings, const Box<T>& best, T best_area,
                                           const Box<T>& box, T score) {
  const T intersection = intersection_area(best, box);
  if (intersection == T(0) && !(settings.method == kNaive && settings.threshold < T(0)))
    return score;  // its weight is 1
  const T iou = rounded_quotient(intersection, (best_area + box_area(box)) - intersection);
  if (iou != iou) return score;
  T weight = T(1);
  if (settings.method == kGaussian) weight = exponential(-(iou * iou) / settings.sigma);
  else if (iou > settings.threshold) weight = settings.method == kLinear ? T(1) - iou : T(0);
  return weight == T(0) && score == score ? T(0) : score * weight;
}

template <class T> struct Candidate {
  ScoreKey<T> key;
  uint32_t position;
};
template <class T> __device__ __forceinline__ Candidate<T> nobody();
template <> __device__ __forceinline__ Candidate<float> nobody<float>() { return {{~0ull}, kNobody}; }
template <> __device__ __forceinline__ Candidate<double> nobody<double>() { return {{~0ull, ~0ull}, kNobody}; }

__device__ __forceinline__ ScoreKey<float> from_lane(const ScoreKey<float>& key, int bits) {
  return {__shfl_xor_sync(kAllLanes, key.bits, bits)};
}
__device__ __forceinline__ ScoreKey<double> from_lane(const ScoreKey<double>& key, int bits) {
  const uint64_t score = __shfl_xor_sync(kAllLanes, key.score, bits);
  return {score, __shfl_xor_sync(kAllLanes, key.at, bits)};
}
template <class T> __device__ __forceinline__ Candidate<T> best_of_warp(Candidate<T> best) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    Candidate<T> other;
    other.key = from_lane(best.key, bits);
    other.position = __shfl_xor_sync(kAllLanes, best.position, bits);
    if (before(other.key, best.key)) best = other;
  }
  return best;
}

// The best candidate of the block, for all its threads. Turns take the two halves of `stage` in turn: one barrier is enough.
template <class T>
__device__ __forceinline__ Candidate<T> best_of_block(Candidate<T> best, Candidate<T> (&stage)[2][kSoftWarps],
                                                      unsigned turn) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  best = best_of_warp(best);
  if (lane == 0) stage[turn % 2][warp] = best;
  __syncthreads();
  return best_of_warp(lane < int(blockDim.x) / 32 ? stage[turn % 2][lane] : nobody<T>());
}

template <class T>
__device__ __forceinline__ Candidate<T> enter_all(const Sorted<T>& sorted, const SoftSettings<T>& settings,
                                                  const SoftState<T>& state, int64_t begin, int64_t end) {
  Candidate<T> best = nobody<T>();
  for (int64_t p = begin + threadIdx.x; p < end; p += blockDim.x) {
    const uint32_t index = sorted.index_of ? sorted.index_of[p] : sorted.order[p];
    const T score = load_as<T>(state.scores, state.storage, index * state.score_row);
    const bool out = score < settings.min_score;
    state.score[p] = score;
    state.state[p] = out ? index | kOut : index;
    state.lowered[index] = -T(__builtin_huge_val());
    const Candidate<T> mine{ScoreKey<T>::of(descending_key(score), index), uint32_t(p)};
    if (!out && before(mine.key, best.key)) best = mine;
  }
  return best;
}

// Records the selected box, lowers the scores of the others, and returns this thread's best of what is left.
template <class T>
__device__ __forceinline__ Candidate<T> sweep(const Sorted<T>& sorted, const SoftSettings<T>& settings,
                                              const SoftState<T>& state, int64_t begin, int64_t end, uint32_t selected,
                                              uint32_t step) {
  const Box<T> winner = sorted.boxes[selected].box;
  const T area = box_area(winner);
  const bool by_class = settings.whole && sorted.classes;
  const int64_t of_class = by_class ? sorted.classes[selected] : 0;
  Candidate<T> best = nobody<T>();
  for (int64_t p = begin + threadIdx.x; p < end; p += blockDim.x) {
    const uint32_t index = state.state[p];
    if (index & kOut) continue;
    T score = state.score[p];
    if (p == selected) {
      state.state[p] = index | kOut;
      state.lowered[index] = score;
      if (settings.whole) state.chosen[step] = index;
      continue;
    }
    if (!by_class || sorted.classes[p] == of_class) {
      score = lowered_score(settings, winner, area, sorted.boxes[p].box, score);
      state.score[p] = score;
      if (score < settings.min_score) {
        state.state[p] = index | kOut;
        continue;
      }
    }
    const Candidate<T> mine{ScoreKey<T>::of(descending_key(score), index), uint32_t(p)};
    if (before(mine.key, best.key)) best = mine;
  }
  return best;
}

template <class T>
__global__ void __launch_bounds__(kSoftThreads, 2)
    soft_nms_kernel(const __grid_constant__ Sorted<T> sorted, const __grid_constant__ SoftSettings<T> settings,
                    const __grid_constant__ SoftState<T> state, int64_t count) {
  __shared__ Candidate<T> stage[2][kSoftWarps];
  const int64_t piece = int64_t(blockIdx.x) * kSoftPiece, position = piece + threadIdx.x % 32;
  bool head = position == 0;
  if (!settings.whole && position > 0 && position < count)
    head = sorted.classes[position] != sorted.classes[position - 1];
  unsigned turn = 0;
  for (uint32_t heads = __ballot_sync(kAllLanes, head); heads; heads &= heads - 1) {
    const int64_t begin = piece + highest_bit(heads & (0 - heads));
    const uint32_t later = heads & (heads - 1);
    int64_t end = count;
    if (later) end = piece + highest_bit(later & (0 - later));
    else if (!settings.whole) end = class_bound<true>(sorted.classes, begin + 1, count, sorted.classes[begin]);
    uint32_t step = 0;
    Candidate<T> best = best_of_block(enter_all(sorted, settings, state, begin, end), stage, turn++);
    for (; best.position != kNobody; ++step)
      best = best_of_block(sweep(sorted, settings, state, begin, end, best.position, step), stage, turn++);
    if (threadIdx.x == 0 && step) atomicAdd(sorted.counts, static_cast<unsigned long long>(step));
  }
}

constexpr int kChosenThreads = 256;

// The selections in order, as the op returns them; the scores in the storage of the input.
template <class T>
__global__ void __launch_bounds__(kChosenThreads)
    list_chosen_kernel(const uint32_t* chosen, const T* lowered, int64_t selected, int64_t* index, void* scores,
                       int32_t storage) {
  for (int64_t i = int64_t(blockIdx.x) * kChosenThreads + threadIdx.x; i < selected;
       i += int64_t(gridDim.x) * kChosenThreads) {
    const uint32_t box = chosen[i];
    const T score = lowered[box];
    index[i] = box;
    switch (storage) {
      case 0:
        static_cast<float*>(scores)[i] = float(score);
        break;
      case 1:
        static_cast<double*>(scores)[i] = double(score);
        break;
      case 2:
        static_cast<__nv_bfloat16*>(scores)[i] = __float2bfloat16_rn(float(score));
        break;
      default:
        static_cast<__half*>(scores)[i] = __float2half_rn(float(score));
    }
  }
}

}  // namespace nasdet::cuda
