// Launches the kernels of depthwise_conv2d*.cuh for nasdet::depthwise_conv2d and nasdet::depthwise_conv2d_backward. Nothing
// here waits for the device.
#include "depthwise_conv2d.cuh"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "depthwise_conv2d_weights.cuh"
#include "launch.h"
#include "nasdet/op_checks.h"

namespace nasdet::cuda {
namespace {

constexpr int64_t kLargestSide = int64_t(1)
                                 << 26;  // of a padded map: positions, and what lies a few taps beyond, fit 32 bits
constexpr int64_t kMostBlocks = int64_t(1) << 20;  // of a grid's x axis; blocks walk what is beyond
constexpr int64_t kLargestGridY = 65535;
constexpr int64_t kFullDevice = 2048;  // blocks that fill any device

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
unsigned clamped(int64_t blocks, int64_t most = kMostBlocks) { return unsigned(std::clamp<int64_t>(blocks, 1, most)); }

struct Problem {
  DepthwiseMaps maps;  // of the forward
  bool nhwc;
};

DepthwiseLine checked_line(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  STD_TORCH_CHECK(stride > 0 && dilation > 0 && padding >= 0,
                  "stride and dilation must be positive and padding not negative, got ", stride, ", ", dilation,
                  " and ", padding);
  STD_TORCH_CHECK(size > 0 && size < kLargestSide && padding < kLargestSide && size + 2 * padding < kLargestSide,
                  "x must have padded sides below 2^26 on CUDA, got ", size, " + 2 x ", padding);
  if (kernel == 1) dilation = 1;
  stride = std::min(stride, kLargestSide);  // one target either way
  const int64_t padded = size + 2 * padding;
  STD_TORCH_CHECK(dilation < kLargestSide && padded >= dilation * (kernel - 1) + 1,
                  "x must be at least as large, padded, as the kernel");
  const int64_t targets = (padded - dilation * (kernel - 1) - 1) / stride + 1;
  return {int32_t(size), int32_t(targets), int32_t(stride), int32_t(padding), int32_t(dilation)};
}

Problem problem_of(const Tensor& x, const Tensor& weight, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                   int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  constexpr int64_t kLargestKernel = 255, kMostChannels = kLargestGridY * 32;
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda(), "x must have shape (N, C, H, W) and be on a CUDA device");
  STD_TORCH_CHECK(on_device_of(weight, x) && weight.scalar_type() == x.scalar_type(),
                  "weight must have the dtype and the device of x");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                      weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 && weight.size(2) <= kLargestKernel,
                  "weight must have shape (C, 1, k, k) with k odd and at most ", kLargestKernel);
  STD_TORCH_CHECK(x.size(1) < kMostChannels, "x must have fewer than ", kMostChannels, " channels on CUDA, got ",
                  x.size(1));
  DepthwiseMaps m{};
  m.images = x.size(0), m.channels = int32_t(x.size(1)), m.kernel = int32_t(weight.size(2));
  m.rows = checked_line(x.size(2), m.kernel, stride_h, padding_h, dilation_h);
  m.columns = checked_line(x.size(3), m.kernel, stride_w, padding_w, dilation_w);
  return {m, is_channels_last(x)};
}

// The map's gradient as a sum over the result's: at stride 1 a forward with the kernel turned round.
DepthwiseMaps adjoint_of(DepthwiseMaps m) {
  const bool strided = m.rows.stride > 1 || m.columns.stride > 1;
  for (DepthwiseLine* line : {&m.rows, &m.columns}) {
    std::swap(line->source, line->target);
    if (!strided) line->padding = line->dilation * (m.kernel - 1) - line->padding;
  }
  m.adjoint = strided, m.turned = !strided;
  return m;
}

// The kernels' template arguments: neighbours in a run along `line` are so many taps apart; 0: only the general kernels can.
int step_of(DepthwiseMaps& m, bool nhwc) {
  const DepthwiseLine& line = nhwc ? m.columns : m.rows;
  const int32_t common = std::gcd(line.stride, line.dilation), step = line.stride / common;
  const bool fast = !m.adjoint && (m.kernel == 3 || m.kernel == 5 || m.kernel == 7) && step <= 2;
  m.spacing = fast        ? std::min(line.dilation / common, line.target)
              : m.adjoint ? std::min(m.columns.stride, m.columns.target)
                          : 1;
  m.runs = runs_of(fast ? line.target : m.columns.target, m.spacing);
  return fast ? step : 0;
}

template <int kValue> using Constant = std::integral_constant<int, kValue>;
template <class F> void with_kernel(int kernel, int step, F f) {
  const auto with_step = [&](auto k) { step == 1 ? f(k, Constant<1>{}) : f(k, Constant<2>{}); };
  switch (kernel) {
    case 3:
      return with_step(Constant<3>{});
    case 5:
      return with_step(Constant<5>{});
    default:
      return with_step(Constant<7>{});
  }
}

template <class S> constexpr int kNarrow = int(4 / sizeof(S));  // channels of a lane where 16 bytes are not aligned
template <class S> int width_of(const DepthwiseMaps& m, const Tensor& a, const Tensor& b) {
  const auto fits = [&](int width) {
    return m.channels % width == 0 && reinterpret_cast<uintptr_t>(a.const_data_ptr()) % (width * sizeof(S)) == 0 &&
           reinterpret_cast<uintptr_t>(b.const_data_ptr()) % (width * sizeof(S)) == 0;
  };
  return fits(kWide<S>) ? kWide<S> : sizeof(S) <= 4 && fits(kNarrow<S>) ? kNarrow<S> : 1;
}

template <class S, int kWidth, int kKernel, int kStep>
void launch_pixels(const DepthwiseMaps& m, const S* source, const S* weight, S* target, cudaStream_t stream) {
  // the weights are read once a block
  constexpr int64_t kGroups = kDepthwiseThreads / kChannelLanes<kWidth>;
  constexpr int64_t kTilesPerBlock = 4;
  const int64_t chunks = divide_up(m.channels, kChunk<kWidth>);
  const int64_t tiles = divide_up(m.images * m.rows.target * m.runs, kGroups);
  const int64_t blocks = std::max(divide_up(tiles, kTilesPerBlock), std::min(tiles, divide_up(kFullDevice, chunks)));
  depthwise_pixels_kernel<S, kWidth, kKernel, kStep>
      <<<dim3(clamped(blocks), unsigned(chunks)), kDepthwiseThreads, 0, stream>>>(m, source, weight, target);
  check_launch("depthwise_pixels_kernel");
}

template <class S, int kWidth, bool kNhwc>
void launch_gather(const DepthwiseMaps& m, const S* source, const S* weight, S* target, cudaStream_t stream) {
  const int64_t items = m.images * m.rows.target * m.runs * (m.channels / kWidth);
  depthwise_gather_kernel<S, kWidth, kNhwc>
      <<<clamped(divide_up(items, kDepthwiseThreads)), kDepthwiseThreads, 0, stream>>>(m, source, weight, target);
  check_launch("depthwise_gather_kernel");
}

// source -> target: the forward, or the gradient of the input. Both lie as `nhwc` says.
void convolve(DepthwiseMaps m, bool nhwc, const Tensor& from, const Tensor& kernels, const Tensor& to) {
  const cudaStream_t stream = current_stream(to);
  const Tensor packed = torch::stable::contiguous(kernels);
  with_storage(to, "x", [&](auto zero) {
    using S = decltype(zero);
    const int width = nhwc ? width_of<S>(m, from, to) : 1;
    const S *source = static_cast<const S*>(from.const_data_ptr()),
            *weight = static_cast<const S*>(packed.const_data_ptr());
    S* target = static_cast<S*>(to.mutable_data_ptr());
    const int step = step_of(m, nhwc);
    if constexpr (sizeof(S) <= 4) {  // float64 is for checking, by the general kernels
      if (step > 0 && (!nhwc || width >= kNarrow<S>)) {
        return with_kernel(m.kernel, step, [&](auto k, auto s) {
          constexpr int kKernel = decltype(k)::value, kStep = decltype(s)::value;
          if (nhwc)
            return width == kWide<S> ? launch_pixels<S, kWide<S>, kKernel, kStep>(m, source, weight, target, stream)
                                     : launch_pixels<S, kNarrow<S>, kKernel, kStep>(m, source, weight, target, stream);
          const int64_t items = m.images * m.channels * m.runs * m.columns.target;
          depthwise_planes_kernel<S, kKernel, kStep>
              <<<clamped(divide_up(items, kDepthwiseThreads)), kDepthwiseThreads, 0, stream>>>(m, source, weight,
                                                                                               target);
          check_launch("depthwise_planes_kernel");
        });
      }
    }
    if (step > 0) m.spacing = 1, m.runs = runs_of(m.columns.target, 1);  // the general kernel's own runs
    if (!nhwc) return launch_gather<S, 1, false>(m, source, weight, target, stream);
    width == kWide<S> ? launch_gather<S, kWide<S>, true>(m, source, weight, target, stream)
                      : launch_gather<S, 1, true>(m, source, weight, target, stream);
  });
}

// Parts of the sums: as many as fill the device, and more where a thread's would be longer than kRunsPerThread.
int64_t parts_of(int64_t runs, int64_t threads, int64_t blocks) {
  const int64_t wanted = std::max(divide_up(kFullDevice, blocks), divide_up(runs, threads * kRunsPerThread));
  return std::max<int64_t>(1, std::min({wanted, divide_up(runs, threads * 4), kLargestGridY}));
}

template <class S, class Launch>
void in_parts(int64_t parts, int64_t count, const Tensor& like, S* out, cudaStream_t stream, Launch launch) {
  using T = arithmetic_t<S>;
  const Tensor partial = torch::stable::empty({parts, count}, ScalarType::Float, std::nullopt, like.device());
  launch(static_cast<T*>(partial.mutable_data_ptr()));
  depthwise_sum_parts_kernel<S><<<clamped(divide_up(count, kDepthwiseThreads)), kDepthwiseThreads, 0, stream>>>(
      static_cast<const T*>(partial.const_data_ptr()), parts, count, out);
  check_launch("depthwise_sum_parts_kernel");
}

template <class S, int kWidth, int kKernel, int kStep>
void launch_pixels_weights(const DepthwiseMaps& m, const S* source, const S* upstream, const Tensor& like, S* out,
                           cudaStream_t stream) {
  const int64_t chunks = divide_up(m.channels, kChunk<kWidth>);
  const int64_t parts = parts_of(m.images * m.rows.target * m.runs, kSlots<kWidth, kKernel>, chunks);
  in_parts<S>(parts, int64_t(m.channels) * kKernel * kKernel, like, out, stream, [&](arithmetic_t<S>* partial) {
    depthwise_pixels_weights_kernel<S, kWidth, kKernel, kStep>
        <<<dim3(unsigned(parts), unsigned(chunks)), kPixelGradThreads<kWidth, kKernel>, 0, stream>>>(m, source,
                                                                                                     upstream, partial);
    check_launch("depthwise_pixels_weights_kernel");
  });
}

// The gradient of the weights.
void correlate(DepthwiseMaps m, bool nhwc, const Tensor& x, const Tensor& grad, const Tensor& dweight) {
  const cudaStream_t stream = current_stream(dweight);
  with_storage(x, "x", [&](auto zero) {
    using S = decltype(zero);
    const int width = nhwc ? width_of<S>(m, x, grad) : 1;
    const S *source = static_cast<const S*>(x.const_data_ptr()),
            *upstream = static_cast<const S*>(grad.const_data_ptr());
    S* out = static_cast<S*>(dweight.mutable_data_ptr());
    const int step = step_of(m, nhwc);
    if constexpr (sizeof(S) <= 4) {
      if (step > 0 && (!nhwc || width >= kNarrow<S>)) {
        return with_kernel(m.kernel, step, [&](auto k, auto s) {
          constexpr int kKernel = decltype(k)::value, kStep = decltype(s)::value;
          if (nhwc)
            return width == kWide<S>
                       ? launch_pixels_weights<S, kWide<S>, kKernel, kStep>(m, source, upstream, dweight, out, stream)
                       : launch_pixels_weights<S, kNarrow<S>, kKernel, kStep>(m, source, upstream, dweight, out,
                                                                              stream);
          const int64_t parts = parts_of(m.images * m.runs * m.columns.target, kPlaneGradThreads, m.channels);
          in_parts<S>(parts, int64_t(m.channels) * kKernel * kKernel, dweight, out, stream,
                      [&](arithmetic_t<S>* partial) {
                        depthwise_planes_weights_kernel<S, kKernel, kStep>
                            <<<dim3(unsigned(m.channels), unsigned(parts)), kPlaneGradThreads, 0, stream>>>(
                                m, source, upstream, partial);
                        check_launch("depthwise_planes_weights_kernel");
                      });
        });
      }
    }
    const unsigned blocks = clamped(int64_t(m.channels) * m.kernel * m.kernel);
    nhwc ? depthwise_any_weights_kernel<S, true><<<blocks, kDepthwiseThreads, 0, stream>>>(m, source, upstream, out)
         : depthwise_any_weights_kernel<S, false><<<blocks, kDepthwiseThreads, 0, stream>>>(m, source, upstream, out);
    check_launch("depthwise_any_weights_kernel");
  });
}

Tensor depthwise_conv2d(Tensor x, Tensor weight, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                        int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  const Problem p = problem_of(x, weight, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_map({x.size(0), x.size(1), p.maps.rows.target, p.maps.columns.target}, x, p.nhwc);
  if (y.numel() > 0) convolve(p.maps, p.nhwc, lying_as(x, p.nhwc), weight, y);
  return y;
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int64_t stride_h,
                                                     int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                                     int64_t dilation_h, int64_t dilation_w, bool need_x,
                                                     bool need_weight) {
  const Problem p = problem_of(x, weight, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  STD_TORCH_CHECK(on_device_of(grad, x) && grad.scalar_type() == x.scalar_type() && grad.dim() == 4 &&
                      grad.size(0) == x.size(0) && grad.size(1) == x.size(1) && grad.size(2) == p.maps.rows.target &&
                      grad.size(3) == p.maps.columns.target,
                  "grad must be like the result");
  const DeviceGuard guard(x.get_device_index());
  const Tensor upstream = lying_as(grad, p.nhwc);
  const Tensor dx = need_x ? empty_map({x.size(0), x.size(1), x.size(2), x.size(3)}, x, p.nhwc) : nothing(x);
  const Tensor dweight = need_weight
                             ? torch::stable::new_empty(weight, {weight.size(0), 1, weight.size(2), weight.size(3)})
                             : nothing(weight);
  if (dx.numel() > 0) convolve(adjoint_of(p.maps), p.nhwc, upstream, weight, dx);
  if (dweight.numel() > 0) correlate(p.maps, p.nhwc, lying_as(x, p.nhwc), upstream, dweight);
  return {dx, dweight};
}

}  // namespace
}  // namespace nasdet::cuda

STABLE_TORCH_LIBRARY_IMPL(nasdet, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&nasdet::cuda::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&nasdet::cuda::depthwise_conv2d_backward));
}
