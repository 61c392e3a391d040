// The weights' gradient of the depthwise convolution in two stages without atomics: parts of the runs of targets are summed,
// partial [parts][channels][taps], and then the parts in their order. Runs are those of the forward. No torch and no runtime
// header: tests run this file on the CPU.
#pragma once
#include "depthwise_conv2d.cuh"

namespace nasdet::cuda {

constexpr int kPlaneGradThreads = 128;
constexpr int64_t kRunsPerThread =
    128;  // of one part, at most: its sums are short, those over parts are kept in double

// A thread of the NHWC kernel has a row of the kernel, kWidth channels and every kSlots-th run.
template <int kWidth, int kKernel>
constexpr int kSlots =
    kDepthwiseThreads / (kChannelLanes<kWidth> * kKernel) > 1 ? kDepthwiseThreads / (kChannelLanes<kWidth> * kKernel)
                                                              : 1;
template <int kWidth, int kKernel>
constexpr int kPixelGradThreads = kChannelLanes<kWidth> * kKernel * kSlots<kWidth, kKernel>;

// Block (x, y): part x, chunk y of the channels.
template <class S, int kWidth, int kKernel, int kStep>
__global__ void __launch_bounds__(kPixelGradThreads<kWidth, kKernel>, kDepthwiseBlocks<kWidth, kKernel>)
    depthwise_pixels_weights_kernel(const __grid_constant__ DepthwiseMaps m, const S* __restrict__ source,
                                    const S* __restrict__ grad, arithmetic_t<S>* partial) {
  using T = arithmetic_t<S>;
  constexpr int kLanes = kChannelLanes<kWidth>, kTaps = kKernel * kKernel, kAll = kPixelGradThreads<kWidth, kKernel>;
  __shared__ T sums[kChunk<kWidth> * kTaps];
  const int lane = int(threadIdx.x) % kLanes;
  const int u = int(threadIdx.x) / kLanes % kKernel;
  const int slot = int(threadIdx.x) / (kLanes * kKernel);
  const int32_t first = int32_t(blockIdx.y) * kChunk<kWidth>, channel = first + lane * kWidth, C = m.channels;
  const int64_t items = m.images * m.rows.target * m.runs;
  const int64_t begin = items * blockIdx.x / gridDim.x, end = channel < C ? items * (blockIdx.x + 1) / gridDim.x : 0;
  T sum[kKernel][kWidth] = {};
#pragma unroll 1
  for (int64_t item = begin + slot; item < end; item += kSlots<kWidth, kKernel>) {
    const DepthwisePlace place = place_in_rows(m, item, m.rows.target);
    const int32_t row = source_of(m.rows, place.row, u, false);
    if (row < 0) continue;
    const S* const line = source + (place.image * m.rows.source + row) * m.columns.source * C + channel;
    const S* const upstream = grad + (place.image * m.rows.target + place.row) * m.columns.target * C + channel;
    const int32_t left = place.column * m.columns.stride - m.columns.padding;
    Pack<S, kWidth> g[kRun];
#pragma unroll
    for (int r = 0; r < kRun; ++r)
      g[r] = pack_at<S, kWidth>(upstream, place.column + r * m.spacing, m.columns.target, C);
#pragma unroll
    for (int q = 0; q < kKernel + kStep * (kRun - 1); ++q) {
      const Pack<S, kWidth> x = pack_at<S, kWidth>(line, left + q * m.columns.dilation, m.columns.source, C);
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        const int v = q - kStep * r;
        if (v < 0 || v >= kKernel) continue;
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          sum[v < 0 || v >= kKernel ? 0 : v][e] += widen<T>(g[r].v[e]) * widen<T>(x.v[e]);
      }
    }
  }
#pragma unroll 1
  for (int turn = 0; turn < kSlots<kWidth, kKernel>;
       ++turn) {  // one slot after the other: the order is always the same
    if (slot == turn) {
#pragma unroll
      for (int v = 0; v < kKernel; ++v)
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          T& all = sums[(lane * kWidth + e) * kTaps + u * kKernel + v];
          all = turn == 0 ? sum[v][e] : all + sum[v][e];
        }
    }
    __syncthreads();
  }
  T* const out = partial + (int64_t(blockIdx.x) * C + first) * kTaps;
  for (int t = int(threadIdx.x); t < kChunk<kWidth> * kTaps; t += kAll)
    if (first + t / kTaps < C) out[t] = sums[t];
}

// The sum over the threads of a block, in thread 0; `warps` is shared memory that nobody else uses.
template <int kThreads, class T> __device__ __forceinline__ T block_sum(T value, T* warps) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = warps[0];
  for (int i = 1; i < kThreads / 32; ++i) sum += warps[i];
  return sum;
}

// NCHW. Block (x, y): channels x, x + gridDim.x, ..., part y.
template <class S, int kKernel, int kStep>
__global__ void __launch_bounds__(kPlaneGradThreads, kKernel == 7 ? 2 : 3)
    depthwise_planes_weights_kernel(const __grid_constant__ DepthwiseMaps m, const S* __restrict__ source,
                                    const S* __restrict__ grad, arithmetic_t<S>* partial) {
  using T = arithmetic_t<S>;
  constexpr int kTaps = kKernel * kKernel, kRows = kKernel + kStep * (kRun - 1), kWarps = kPlaneGradThreads / 32;
  __shared__ T warps[kTaps][kWarps];
  const int64_t of_image = int64_t(m.runs) * m.columns.target;
  const int64_t items = m.images * of_image;
  const int64_t step = int64_t(m.rows.dilation) * m.columns.source;
  const int64_t begin = items * blockIdx.y / gridDim.y, end = items * (blockIdx.y + 1) / gridDim.y;
#pragma unroll 1
  for (int64_t channel = blockIdx.x; channel < m.channels; channel += gridDim.x) {
    T sum[kKernel][kKernel] = {};
#pragma unroll 1
    for (int64_t item = begin + threadIdx.x; item < end; item += kPlaneGradThreads) {
      const DepthwisePlace place = place_in_columns(m, item, m.columns.target);
      const int64_t plane = place.image * m.channels + channel;
      const int32_t top = place.row * m.rows.stride - m.rows.padding;
      const uint32_t there = rows_there<kRows>(m.rows, top);
      const int64_t corner = (plane * m.rows.source + top) * m.columns.source;
      const int64_t upstream = plane * m.rows.target * m.columns.target + place.column;
      T g[kRun];
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        const int32_t row = place.row + r * m.spacing;
        g[r] = row < m.rows.target ? widen<T>(grad[upstream + int64_t(row) * m.columns.target]) : T(0);
      }
#pragma unroll
      for (int v = 0; v < kKernel; ++v) {
        const int32_t at = source_of(m.columns, place.column, v, false);
        T x[kRows];
#pragma unroll
        for (int q = 0; q < kRows; ++q)
          x[q] = at >= 0 && (there >> q & 1) ? widen<T>(source[corner + q * step + at]) : T(0);
#pragma unroll
        for (int u = 0; u < kKernel; ++u)
#pragma unroll
          for (int r = 0; r < kRun; ++r) sum[u][v] += g[r] * x[u + kStep * r];
      }
    }
#pragma unroll
    for (int u = 0; u < kKernel; ++u)
#pragma unroll
      for (int v = 0; v < kKernel; ++v) {
        T value = sum[u][v];
#pragma unroll
        for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
        if (threadIdx.x % 32 == 0) warps[u * kKernel + v][threadIdx.x / 32] = value;
      }
    __syncthreads();
    if (int(threadIdx.x) < kTaps) {
      T value = warps[threadIdx.x][0];
      for (int i = 1; i < kWarps; ++i) value += warps[threadIdx.x][i];
      partial[(int64_t(blockIdx.y) * m.channels + channel) * kTaps + threadIdx.x] = value;
    }
    __syncthreads();  // before the next channel's sums
  }
}

// Everything else: any kernel and stride, either layout. Block x takes weights x, x + gridDim.x, ... whole, in double.
template <class S, bool kNhwc>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_any_weights_kernel(const __grid_constant__ DepthwiseMaps m, const S* __restrict__ source,
                                 const S* __restrict__ grad, S* out) {
  using T = arithmetic_t<S>;
  __shared__ double warps[kDepthwiseThreads / 32];
  const int64_t taps = int64_t(m.kernel) * m.kernel, weights = taps * m.channels, C = m.channels;
  const int64_t targets = int64_t(m.rows.target) * m.columns.target;
  const int64_t sources = int64_t(m.rows.source) * m.columns.source;
#pragma unroll 1
  for (int64_t index = blockIdx.x; index < weights; index += gridDim.x) {
    const int64_t channel = index / taps, tap = index % taps;
    const int32_t u = int32_t(tap / m.kernel), v = int32_t(tap % m.kernel);
    double sum = 0;
#pragma unroll 1
    for (int64_t item = threadIdx.x; item < m.images * targets; item += kDepthwiseThreads) {
      int64_t pixel, column;
      const int64_t image = quotient_of(item, targets, pixel);
      const int64_t target_row = quotient_of(pixel, m.columns.target, column);
      const int32_t row = source_of(m.rows, int32_t(target_row), u, false);
      const int32_t at = source_of(m.columns, int32_t(column), v, false);
      if (row < 0 || at < 0) continue;
      const int64_t from = int64_t(row) * m.columns.source + at;
      const T x =
          widen<T>(source[kNhwc ? (image * sources + from) * C + channel : (image * C + channel) * sources + from]);
      const T g = widen<T>(grad[kNhwc ? item * C + channel : (image * C + channel) * targets + pixel]);
      sum += double(g) * double(x);
    }
    sum = block_sum<kDepthwiseThreads>(sum, warps);
    if (threadIdx.x == 0) out[index] = narrow<S>(T(sum));
    __syncthreads();  // before the next weight's sums
  }
}

// out[i] = the sum of partial[part][i] over the parts, in their order.
template <class S>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_sum_parts_kernel(const arithmetic_t<S>* partial, int64_t parts, int64_t count, S* out) {
  using T = arithmetic_t<S>;
#pragma unroll 1
  for (int64_t i = int64_t(blockIdx.x) * kDepthwiseThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kDepthwiseThreads) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += double(partial[part * count + i]);
    out[i] = narrow<S>(T(sum));
  }
}

}  // namespace nasdet::cuda
