// nasdet::depthwise_conv2d and its gradients: one kernel per channel, maps in NCHW and NHWC as they are.
#include "depthwise_conv2d_jobs.h"
#include "nasdet/isa.h"

NASDET_DECLARE_KERNEL(void, depthwise_pack, int storage, const void* weight, int64_t channels, int64_t kernel,
                      bool flip_rows, bool flip_columns, bool pixels, void* packed)
NASDET_DECLARE_KERNEL(void, depthwise_unpack, int storage, const double* const* parts, int64_t part_count,
                      int64_t count, void* weight)
NASDET_DECLARE_KERNEL(void, depthwise_pixels, const DepthwisePixels&, const DepthwiseTile&, int64_t image,
                      int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, depthwise_planes, const DepthwisePlanes&, int64_t first, int64_t last, void* scratch)
NASDET_DECLARE_KERNEL(void, depthwise_pixels_grad, const DepthwiseGrad&, int64_t first, int64_t last, int64_t begin,
                      int64_t end, void* scratch, double* total)
NASDET_DECLARE_KERNEL(void, depthwise_planes_grad, const DepthwiseGrad&, int64_t images, int64_t channel, bool first,
                      void* scratch, double* total)

#include "depthwise_conv2d_pixels.h"
#include "depthwise_conv2d_planes.h"

namespace nasdet::NASDET_ISA {
namespace {

template <class S> struct As { using type = S; };
template <class F> NASDET_INLINE void with_storage([[maybe_unused]] int storage, F&& f) {
#ifdef __AVX512BF16__  // NASDET_STORAGE_KERNEL
  f(As<BFloat16>{});
#else
  switch (storage) {
    case 0:
      return f(As<float>{});
    case 1:
      return f(As<double>{});
    case 2:
      return f(As<BFloat16>{});
    case 3:
      return f(As<Half>{});
  }
#endif
}

template <class S>
void pack(const S* weight, int64_t channels, int64_t kernel, bool flip_rows, bool flip_columns, bool pixels,
          arithmetic_t<S>* packed) {
  const int64_t taps = kernel * kernel;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < kernel; ++i)
      for (int64_t j = 0; j < kernel; ++j) {
        const int64_t to = (flip_rows ? kernel - 1 - i : i) * kernel + (flip_columns ? kernel - 1 - j : j);
        packed[pixels ? to * channels + c : c * taps + to] = widened(weight[c * taps + i * kernel + j]);
      }
}

}  // namespace

void depthwise_pack(int storage, const void* weight, int64_t channels, int64_t kernel, bool flip_rows,
                    bool flip_columns, bool pixels, void* packed) {
  with_storage(storage, [&](auto as) {
    using S = typename decltype(as)::type;
    pack(static_cast<const S*>(weight), channels, kernel, flip_rows, flip_columns, pixels,
         static_cast<arithmetic_t<S>*>(packed));
  });
}

// weight = the sum of the parts, in their order.
void depthwise_unpack(int storage, const double* const* parts, int64_t part_count, int64_t count, void* weight) {
  with_storage(storage, [&](auto as) {
    using S = typename decltype(as)::type;
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t p = 0; p < part_count; ++p) sum += parts[p][i];
      const arithmetic_t<S> value = arithmetic_t<S>(sum);
      narrow_row(&value, 1, static_cast<S*>(weight) + i);
    }
  });
}

void depthwise_pixels(const DepthwisePixels& p, const DepthwiseTile& tile, int64_t image, int64_t begin, int64_t end) {
  with_storage(p.storage, [&](auto as) { convolve_pixels<typename decltype(as)::type>(p, tile, image, begin, end); });
}

void depthwise_planes(const DepthwisePlanes& p, int64_t first, int64_t last, void* scratch) {
  with_storage(p.storage, [&](auto as) {
    using S = typename decltype(as)::type;
    clear_ring<arithmetic_t<S>>(p, scratch);
    for (int64_t i = first; i < last; ++i) convolve_plane<S>(p, i, scratch);
  });
}

void depthwise_pixels_grad(const DepthwiseGrad& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                           void* scratch, double* total) {
  with_storage(p.storage,
               [&](auto as) { grad_pixels<typename decltype(as)::type>(p, first, last, begin, end, scratch, total); });
}

void depthwise_planes_grad(const DepthwiseGrad& p, int64_t images, int64_t channel, bool first, void* scratch,
                           double* total) {
  with_storage(p.storage,
               [&](auto as) { grad_plane<typename decltype(as)::type>(p, images, channel, first, scratch, total); });
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include "depthwise_conv2d_launch.h"

namespace nasdet {
namespace {

DepthwiseProblem problem_of(const Tensor& x, const Tensor& weight, int64_t stride_h, int64_t stride_w,
                            int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  constexpr int64_t kMost = 1 << 30;
  STD_TORCH_CHECK(
      x.dim() == 4 && x.is_cpu() && x.size(2) > 0 && x.size(3) > 0 && x.size(2) < kMost && x.size(3) < kMost,
      "x must have shape (N, C, H, W) and be on the CPU");
  STD_TORCH_CHECK(on_device_of(weight, x) && weight.scalar_type() == x.scalar_type(),
                  "weight must have the dtype and the device of x");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                      weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 && weight.size(2) <= kDepthwiseKernel,
                  "weight must have shape (C, 1, k, k) with k odd and at most ", kDepthwiseKernel);
  for (int64_t value : {stride_h, stride_w, dilation_h, dilation_w})
    STD_TORCH_CHECK(value > 0 && value < kMost, "stride and dilation must be positive and below 2^30, got ", value);
  for (int64_t value : {padding_h, padding_w})
    STD_TORCH_CHECK(value >= 0 && value < kMost * kDepthwiseKernel,
                    "padding must be from 0 to the largest kernel's reach, got ", value);
  DepthwiseProblem p{x.size(0),
                     x.size(1),
                     weight.size(2),
                     {x.size(2), 0, stride_h, padding_h, dilation_h},
                     {x.size(3), 0, stride_w, padding_w, dilation_w},
                     storage_code(x, "x"),
                     false};
  for (DepthwiseSide* side : {&p.rows, &p.columns}) {
    const int64_t room = side->in + 2 * side->padding - side->dilation * (p.kernel - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "x must be at least as large, padded, as the kernel");
    side->out = room / side->stride + 1;
    if (side->out == 1) side->stride = 1;  // of no effect, and scratch grows with it
  }
  p.pixels = is_channels_last(x) && p.channels >= kLeastPixelChannels;
  return p;
}

// `t` as the problem wants it, and back as `x` lies.
Tensor made(const DepthwiseProblem& p, const Tensor& x, int64_t height, int64_t width) {
  return empty_result({p.images, p.channels, height, width}, x, p.pixels);
}
Tensor handed_over(const DepthwiseProblem& p, const Tensor& x, const Tensor& t) {
  return !p.pixels && is_channels_last(x) ? lying_as(t, true) : t;
}

Tensor depthwise_conv2d(Tensor x, Tensor weight, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                        int64_t padding_w, int64_t dilation_h, int64_t dilation_w) {
  const DepthwiseProblem p = problem_of(x, weight, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  Tensor y = made(p, x, p.rows.out, p.columns.out);
  if (y.numel() > 0) convolve(p, lying_as(x, p.pixels), torch::stable::contiguous(weight), y, false);
  return handed_over(p, x, y);
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int64_t stride_h,
                                                     int64_t stride_w, int64_t padding_h, int64_t padding_w,
                                                     int64_t dilation_h, int64_t dilation_w, bool need_x,
                                                     bool need_weight) {
  const DepthwiseProblem p = problem_of(x, weight, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w);
  STD_TORCH_CHECK(on_device_of(grad, x) && grad.scalar_type() == x.scalar_type() && grad.dim() == 4 &&
                      grad.size(0) == p.images && grad.size(1) == p.channels && grad.size(2) == p.rows.out &&
                      grad.size(3) == p.columns.out,
                  "grad must be like the result");
  const Tensor upstream = lying_as(grad, p.pixels);
  Tensor dx = need_x ? made(p, x, p.rows.in, p.columns.in) : nothing(x);
  Tensor dweight =
      need_weight ? torch::stable::new_empty(weight, {p.channels, 1, p.kernel, p.kernel}) : nothing(weight);
  if (dx.numel() > 0) convolve(p, upstream, torch::stable::contiguous(weight), dx, true);
  if (dweight.numel() > 0) correlate(p, lying_as(x, p.pixels), upstream, dweight);
  return {need_x ? handed_over(p, x, dx) : dx, dweight};
}

}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&nasdet::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&nasdet::depthwise_conv2d_backward));
}
#endif
