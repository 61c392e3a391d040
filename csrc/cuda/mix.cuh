// The kernels of y = sum_p w_p x_p and its gradients: every map is read once, every result written once. No torch and no
// runtime header: tests compile this file with g++ and run it on the CPU.
#pragma once
#include <cstdint>

#include "storage.cuh"

namespace nasdet::cuda {

constexpr int kMaxMaps = 64;  // maps of one launch; longer lists take several
constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // forward: maps that a thread loads together
constexpr int kGroup = 8;     // backward: maps whose dot products a thread keeps

// Passed by value as __grid_constant__: it lies in constant memory, where a run-time index costs no stack frame.
struct MixMaps {
  const void* x[kMaxMaps];
  void* dx[kMaxMaps];  // backward only
  int32_t maps;
};

// The grid of a launch over `packs` packs. Sizes alone decide: sums do not depend on the device.
// packs of one thread, unless that takes more blocks
constexpr int64_t kForwardPacks = 1;
constexpr int64_t kMostForwardBlocks = 1 << 20;
constexpr int64_t kBackwardPacks = 4, kMostBackwardBlocks = 1 << 14;

inline int64_t blocks_for(int64_t packs, int64_t packs_per_thread, int64_t most) {
  const int64_t per_block = kThreads * packs_per_thread, blocks = (packs + per_block - 1) / per_block;
  return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

// What is left beyond the last whole pack is handled one element a thread: element `tail_start + i` by thread i of the grid.
__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return int64_t(gridDim.x) * kThreads; }

template <class S, int kWidth, class T>
__device__ __forceinline__ void sum_pack(const MixMaps& maps, const T* weights, S* out, const T* carry_in, T* carry_out,
                                         int64_t at) {
  using P = Pack<S, kWidth>;
  T sum[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sum[e] = carry_in ? carry_in[at + e] : T(0);
  for (int first = 0; first < maps.maps; first += kInFlight) {
    P x[kInFlight];
    T w[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      w[u] = first + u < maps.maps ? __ldg(weights + first + u) : T(0);
      x[u] = P{};
      if (w[u] != T(0)) x[u] = *reinterpret_cast<const P*>(static_cast<const S*>(maps.x[first + u]) + at);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sum[e] += w[u] * widen<T>(x[u].v[e]);
  }
  if (carry_out) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) carry_out[at + e] = sum[e];
    return;
  }
  P result;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) result.v[e] = narrow<S>(sum[e]);
  *reinterpret_cast<P*>(out + at) = result;
}

// carry_in / carry_out: the sum over the maps of earlier launches, and for later ones; null in the first and the last.
template <class S, int kWidth>
__global__ void __launch_bounds__(kThreads)
    mix_forward_kernel(const __grid_constant__ MixMaps maps, const arithmetic_t<S>* weights, S* out,
                       const arithmetic_t<S>* carry_in, arithmetic_t<S>* carry_out, int64_t count) {
  const int64_t packs = count / kWidth;
  for (int64_t i = thread_index(); i < packs; i += thread_count())
    sum_pack<S, kWidth>(maps, weights, out, carry_in, carry_out, i * kWidth);
  const int64_t tail = packs * kWidth + thread_index();
  if (tail < count) sum_pack<S, 1>(maps, weights, out, carry_in, carry_out, tail);
}

// dx_p = w_p g, and this thread's share of <g, x_p>, for the kGroup maps from `first`.
template <class S, int kWidth, class T>
__device__ __forceinline__ void gradient_pack(const MixMaps& maps, int first, const T (&w)[kGroup], const S* grad,
                                              bool need_xs, bool need_weights, T (&dot)[kGroup], int64_t at) {
  using P = Pack<S, kWidth>;
  const P g = *reinterpret_cast<const P*>(grad + at);
  P x[kGroup];
#pragma unroll
  for (int u = 0; u < kGroup; ++u) {  // every load before the first store, which the compiler could not move it over
    x[u] = P{};
    if (need_weights && first + u < maps.maps)
      x[u] = *reinterpret_cast<const P*>(static_cast<const S*>(maps.x[first + u]) + at);
  }
#pragma unroll
  for (int u = 0; u < kGroup; ++u) {
    if (need_weights) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) dot[u] += widen<T>(g.v[e]) * widen<T>(x[u].v[e]);
    }
    if (need_xs && first + u < maps.maps) {
      P dx;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) dx.v[e] = narrow<S>(w[u] * widen<T>(g.v[e]));
      *reinterpret_cast<P*>(static_cast<S*>(maps.dx[first + u]) + at) = dx;
    }
  }
}

template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  return v;
}

// blockIdx.y: the group of kGroup maps. partial [maps, gridDim.x], null when gradients of the weights are not wanted.
template <class S, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    mix_backward_kernel(const __grid_constant__ MixMaps maps, const arithmetic_t<S>* weights, const S* grad,
                        arithmetic_t<S>* partial, bool need_xs, int64_t count) {
  using T = arithmetic_t<S>;
  const int first = int(blockIdx.y) * kGroup;
  T w[kGroup], dot[kGroup];
#pragma unroll
  for (int u = 0; u < kGroup; ++u) {
    w[u] = first + u < maps.maps ? __ldg(weights + first + u) : T(0);
    dot[u] = T(0);
  }
  const int64_t packs = count / kWidth;
  for (int64_t i = thread_index(); i < packs; i += thread_count())
    gradient_pack<S, kWidth>(maps, first, w, grad, need_xs, partial != nullptr, dot, i * kWidth);
  const int64_t tail = packs * kWidth + thread_index();
  if (tail < count) gradient_pack<S, 1>(maps, first, w, grad, need_xs, partial != nullptr, dot, tail);
  if (!partial) return;
  __shared__ T warps[kGroup][kThreads / 32];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
  for (int u = 0; u < kGroup; ++u) {
    const T sum = warp_sum(dot[u]);
    if (lane == 0) warps[u][warp] = sum;
  }
  __syncthreads();
  const int u = int(threadIdx.x);
  if (u >= kGroup || first + u >= maps.maps) return;
  T sum = T(0);
  for (int i = 0; i < kThreads / 32; ++i) sum += warps[u][i];
  partial[int64_t(first + u) * gridDim.x + blockIdx.x] = sum;
}

// sums[p] = sum of row p of partial [gridDim.x, columns], always in the same order.
template <class T>
__global__ void __launch_bounds__(kThreads) mix_reduce_kernel(const T* partial, T* sums, int64_t columns) {
  const T* row = partial + int64_t(blockIdx.x) * columns;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < columns; i += kThreads) sum += double(row[i]);
  __shared__ double warps[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  double total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += warps[i];
  sums[blockIdx.x] = T(total);
}

}  // namespace nasdet::cuda
