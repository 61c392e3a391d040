// The kernels of the depthwise convolution and of its map's gradient, which at stride 1 is the same sum with the kernel
// turned round. A thread makes kRun targets that read the same sources: columns of kWidth channels in NHWC, where the lanes
// are channels; rows of one column in NCHW, where the lanes are columns. No torch and no runtime header: tests run this file
// on the CPU.
#pragma once
#include "storage.cuh"

namespace nasdet::cuda {

constexpr int kDepthwiseThreads = 256;
// Blocks that share a multiprocessor, at least: with more, registers would spill.
template <int kWidth, int kKernel> constexpr int kDepthwiseBlocks = kWidth * kKernel >= 40 ? 1 : 2;
constexpr int kRun = 4;  // targets of a thread

// One axis of the sum: target t and tap k meet at source t * stride - padding + k * dilation (`adjoint`: where that is the
// target and t the source).
struct DepthwiseLine { int32_t source, target, stride, padding, dilation; };

struct DepthwiseMaps {
  int64_t images;
  int32_t channels, kernel;
  DepthwiseLine rows, columns;
  int32_t spacing, runs;  // a thread's targets lie `spacing` apart, and so many threads make a line of them
  bool adjoint, turned;   // `turned`: the kernel is
};

// Targets of an axis in runs of kRun, `spacing` apart.
inline int32_t runs_of(int32_t targets, int32_t spacing) {
  return (targets + kRun * spacing - 1) / (kRun * spacing) * spacing;
}
__device__ __forceinline__ int32_t first_of_run(int32_t run, int32_t spacing) {
  return run / spacing * (kRun * spacing) + run % spacing;
}

// value = quotient * by + rest; by 32-bit division where that is enough.
__device__ __forceinline__ int64_t quotient_of(int64_t value, int64_t by, int64_t& rest) {
  if (((value | by) >> 32) == 0) {
    const uint32_t quotient = uint32_t(value) / uint32_t(by);
    rest = int64_t(uint32_t(value) - quotient * uint32_t(by));
    return quotient;
  }
  const int64_t quotient = value / by;
  rest = value - quotient * by;
  return quotient;
}

// The source of a target by a tap, or -1.
__device__ __forceinline__ int32_t source_of(const DepthwiseLine& line, int32_t target, int32_t tap, bool adjoint) {
  int32_t at =
      adjoint ? target + line.padding - tap * line.dilation : target * line.stride - line.padding + tap * line.dilation;
  if (at < 0) return -1;
  if (adjoint) {
    if (at % line.stride) return -1;
    at /= line.stride;
  }
  return at < line.source ? at : -1;
}

// NHWC. Channels of a block, kWidth to a lane.
template <int kWidth> constexpr int kChannelLanes = 64 / kWidth < 32 ? 64 / kWidth : 32;
template <int kWidth> constexpr int kChunk = kChannelLanes<kWidth> * kWidth;

// Where a run of columns lies.
struct DepthwisePlace {
  int64_t image;
  int32_t row, column;
};
__device__ __forceinline__ DepthwisePlace place_in_rows(const DepthwiseMaps& m, int64_t item, int32_t rows) {
  int64_t run, row;
  const int64_t line = quotient_of(item, m.runs, run);
  const int64_t image = quotient_of(line, rows, row);
  return {image, int32_t(row), first_of_run(int32_t(run), m.spacing)};
}

template <class S, int kWidth>
__device__ __forceinline__ Pack<S, kWidth> pack_at(const S* line, int32_t column, int32_t columns, int32_t channels) {
  if (uint32_t(column) < uint32_t(columns))
    return *reinterpret_cast<const Pack<S, kWidth>*>(line + int64_t(column) * channels);
  return Pack<S, kWidth>{};
}

// Block (x, y): chunk y of the channels, every gridDim.x-th share of the runs. Neighbours in a run are kStep taps apart.
template <class S, int kWidth, int kKernel, int kStep>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks<kWidth, kKernel>)
    depthwise_pixels_kernel(const __grid_constant__ DepthwiseMaps m, const S* __restrict__ source,
                            const S* __restrict__ weight, S* __restrict__ target) {
  using T = arithmetic_t<S>;
  constexpr int kLanes = kChannelLanes<kWidth>;
  constexpr int kTaps = kKernel * kKernel;
  constexpr int kPitch = kChunk<kWidth> + (kWidth < 4 ? 4 : kWidth);
  constexpr int kGroups = kDepthwiseThreads / kLanes;
  alignas(32) __shared__ T weights[kTaps * kPitch];
  const int32_t first = int32_t(blockIdx.y) * kChunk<kWidth>, C = m.channels;
  for (int t = int(threadIdx.x); t < kChunk<kWidth> * kTaps; t += kDepthwiseThreads) {
    const int c = t / kTaps, tap = t % kTaps;
    if (first + c < C)
      weights[(m.turned ? kTaps - 1 - tap : tap) * kPitch + c] = widen<T>(weight[int64_t(first) * kTaps + t]);
  }
  __syncthreads();
  const int lane = int(threadIdx.x) % kLanes, group = int(threadIdx.x) / kLanes;
  const int32_t channel = first + lane * kWidth;
  if (channel >= C) return;
  const T* const own = weights + lane * kWidth;
  const int64_t items = m.images * m.rows.target * m.runs;
#pragma unroll 1
  for (int64_t item = int64_t(blockIdx.x) * kGroups + group; item < items; item += int64_t(gridDim.x) * kGroups) {
    const DepthwisePlace place = place_in_rows(m, item, m.rows.target);
    const int32_t begin = place.column * m.columns.stride - m.columns.padding;
    T sum[kRun][kWidth] = {};
#pragma unroll 1
    for (int u = 0; u < kKernel; ++u) {
      const int32_t row = source_of(m.rows, place.row, u, false);
      if (row < 0) continue;
      const S* const line = source + (place.image * m.rows.source + row) * m.columns.source * C + channel;
      Pack<T, kWidth> w[kKernel];
#pragma unroll
      for (int v = 0; v < kKernel; ++v)
        w[v] = *reinterpret_cast<const Pack<T, kWidth>*>(own + (u * kKernel + v) * kPitch);
#pragma unroll
      for (int q = 0; q < kKernel + kStep * (kRun - 1); ++q) {
        const Pack<S, kWidth> x = pack_at<S, kWidth>(line, begin + q * m.columns.dilation, m.columns.source, C);
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          const int v = q - kStep * r;
          if (v < 0 || v >= kKernel) continue;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[r][e] += w[v < 0 || v >= kKernel ? 0 : v].v[e] * widen<T>(x.v[e]);
        }
      }
    }
    S* const out = target + (place.image * m.rows.target + place.row) * m.columns.target * C + channel;
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      const int32_t column = place.column + r * m.spacing;
      if (column >= m.columns.target) break;
      Pack<S, kWidth> y;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) y.v[e] = narrow<S>(sum[r][e]);
      *reinterpret_cast<Pack<S, kWidth>*>(out + int64_t(column) * C) = y;
    }
  }
}

// NCHW: where a run of rows lies.
__device__ __forceinline__ DepthwisePlace place_in_columns(const DepthwiseMaps& m, int64_t item, int32_t columns) {
  int64_t within, column;
  const int64_t plane = quotient_of(item, int64_t(m.runs) * columns, within);
  const int64_t run = quotient_of(within, columns, column);
  return {plane, first_of_run(int32_t(run), m.spacing), int32_t(column)};
}

// Which of a run's source rows exist, as bits.
template <int kRows> __device__ __forceinline__ uint32_t rows_there(const DepthwiseLine& rows, int32_t begin) {
  uint32_t there = 0;
#pragma unroll
  for (int q = 0; q < kRows; ++q) there |= uint32_t(uint32_t(begin + q * rows.dilation) < uint32_t(rows.source)) << q;
  return there;
}

template <class S, int kKernel, int kStep>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_planes_kernel(const __grid_constant__ DepthwiseMaps m, const S* __restrict__ source,
                            const S* __restrict__ weight, S* __restrict__ target) {
  using T = arithmetic_t<S>;
  constexpr int kTaps = kKernel * kKernel, kRows = kKernel + kStep * (kRun - 1);
  const int64_t items = m.images * m.channels * m.runs * m.columns.target;
  const int64_t step = int64_t(m.rows.dilation) * m.columns.source;
#pragma unroll 1
  for (int64_t item = int64_t(blockIdx.x) * kDepthwiseThreads + threadIdx.x; item < items;
       item += int64_t(gridDim.x) * kDepthwiseThreads) {
    const DepthwisePlace place = place_in_columns(m, item, m.columns.target);
    int64_t channel;
    quotient_of(place.image, m.channels, channel);
    const S* const own = weight + channel * kTaps;
    const int32_t begin = place.row * m.rows.stride - m.rows.padding;
    const uint32_t there = rows_there<kRows>(m.rows, begin);
    const int64_t corner = (place.image * m.rows.source + begin) * m.columns.source;
    T sum[kRun] = {};
#pragma unroll 1
    for (int v = 0; v < kKernel; ++v) {
      const int32_t at = source_of(m.columns, place.column, v, false);
      if (at < 0) continue;
      T w[kKernel], x[kRows];
#pragma unroll
      for (int u = 0; u < kKernel; ++u) w[u] = widen<T>(own[m.turned ? kTaps - 1 - u * kKernel - v : u * kKernel + v]);
#pragma unroll
      for (int q = 0; q < kRows; ++q) x[q] = there >> q & 1 ? widen<T>(source[corner + q * step + at]) : T(0);
#pragma unroll
      for (int q = 0; q < kRows; ++q)
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          const int u = q - kStep * r;
          if (u >= 0 && u < kKernel) sum[r] += w[u < 0 || u >= kKernel ? 0 : u] * x[q];
        }
    }
    S* const out = target + place.image * m.rows.target * m.columns.target + place.column;
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      const int32_t row = place.row + r * m.spacing;
      if (row < m.rows.target) out[int64_t(row) * m.columns.target] = narrow<S>(sum[r]);
    }
  }
}

// Everything else: any kernel, any stride, gradients of strided maps. Targets of a run have the same taps there, as they lie a
// stride apart; runs of columns in both layouts, kWidth channels to a thread (1 in NCHW).
template <class S, int kWidth, bool kNhwc>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_gather_kernel(const __grid_constant__ DepthwiseMaps m, const S* __restrict__ source,
                            const S* __restrict__ weight, S* __restrict__ target) {
  using T = arithmetic_t<S>;
  static_assert(kNhwc || kWidth == 1, "a plane has one channel");
  const int64_t packs = kNhwc ? m.channels / kWidth : 1, lines = kNhwc ? m.images : m.images * m.channels;
  const int64_t items = lines * m.rows.target * m.runs * packs, taps = int64_t(m.kernel) * m.kernel;
  const int64_t pitch = kNhwc ? m.channels : 1;  // from column to column
#pragma unroll 1
  for (int64_t item = int64_t(blockIdx.x) * kDepthwiseThreads + threadIdx.x; item < items;
       item += int64_t(gridDim.x) * kDepthwiseThreads) {
    int64_t pack, channel;
    const DepthwisePlace place = place_in_rows(m, quotient_of(item, packs, pack), m.rows.target);
    if (kNhwc) channel = pack * kWidth;
    else quotient_of(place.image, m.channels, channel);
    const int64_t offset = kNhwc ? channel : 0;
    T sum[kRun][kWidth] = {};
#pragma unroll 1
    for (int32_t u = 0; u < m.kernel; ++u) {
      const int32_t row = source_of(m.rows, place.row, u, m.adjoint);
      if (row < 0) continue;
      const S* const line = source + (place.image * m.rows.source + row) * m.columns.source * pitch + offset;
#pragma unroll 1
      for (int32_t v = 0; v < m.kernel; ++v) {
        int32_t at[kRun];
        bool any = false;
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          const int32_t column = place.column + r * m.spacing;
          at[r] = column < m.columns.target ? source_of(m.columns, column, v, m.adjoint) : -1;
          any |= at[r] >= 0;
        }
        if (!any) continue;
        const int64_t tap = m.turned ? taps - 1 - u * m.kernel - v : u * m.kernel + v;
        T w[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) w[e] = widen<T>(weight[(channel + e) * taps + tap]);
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          if (at[r] < 0) continue;
          const Pack<S, kWidth> x = *reinterpret_cast<const Pack<S, kWidth>*>(line + at[r] * pitch);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[r][e] += w[e] * widen<T>(x.v[e]);
        }
      }
    }
    S* const out = target + (place.image * m.rows.target + place.row) * m.columns.target * pitch + offset;
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      const int32_t column = place.column + r * m.spacing;
      if (column >= m.columns.target) break;
      Pack<S, kWidth> y;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) y.v[e] = narrow<S>(sum[r][e]);
      *reinterpret_cast<Pack<S, kWidth>*>(out + column * pitch) = y;
    }
  }
}

}  // namespace nasdet::cuda
