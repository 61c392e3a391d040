// y = sum_p w_p relu(GN_p(x_p)) and its gradients. Neither the normalised nor the rectified maps are ever stored: backward
// recomputes them from x_p, the saved mean and 1/std.
#include "nasdet/isa.h"
#include "norm_act_mix_pixels.h"
#include "norm_act_mix_planes.h"

// NCHW: units are (batch, group) pairs. `sum` has room for one group's slice.
NASDET_DECLARE_KERNEL(void, norm_act_mix_planes_forward, const NormActMixArgs&, int64_t unit, void* sum)
NASDET_DECLARE_KERNEL(void, norm_act_mix_planes_backward, const NormActMixArgs&, int64_t unit)
// NHWC: units are pixel blocks of one image.
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_moments, const NormActMixArgs&, int64_t map, int64_t image,
                      int64_t block, Moments* per_group, void* scratch)
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_forward, const NormActMixArgs&, int64_t image, int64_t block,
                      void* scratch)
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_sums, const NormActMixArgs&, int64_t map, int64_t image, int64_t block,
                      double* a, double* b, void* scratch)
NASDET_DECLARE_KERNEL(void, norm_act_mix_pixels_backward, const NormActMixArgs&, int64_t map, int64_t image,
                      int64_t block, void* scratch)

namespace nasdet::NASDET_ISA {

#define NASDET_BY_STORAGE(call) \
  switch (a.storage) {          \
    case 0: {                   \
      using S = float;          \
      call;                     \
    } break;                    \
    case 1: {                   \
      using S = double;         \
      call;                     \
    } break;                    \
    case 2: {                   \
      using S = BFloat16;       \
      call;                     \
    } break;                    \
    case 3: {                   \
      using S = Half;           \
      call;                     \
    } break;                    \
  }

void norm_act_mix_planes_forward(const NormActMixArgs& a, int64_t unit, void* sum) {
  NASDET_BY_STORAGE(planes_forward<S>(a, unit, sum))
}
void norm_act_mix_planes_backward(const NormActMixArgs& a, int64_t unit) {
  NASDET_BY_STORAGE(planes_backward<S>(a, unit))
}
void norm_act_mix_pixels_moments(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, Moments* per_group,
                                 void* scratch) {
  NASDET_BY_STORAGE(pixels_moments<S>(a, map, image, block, per_group, scratch))
}
void norm_act_mix_pixels_forward(const NormActMixArgs& a, int64_t image, int64_t block, void* scratch) {
  NASDET_BY_STORAGE(pixels_forward<S>(a, image, block, scratch))
}
void norm_act_mix_pixels_sums(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, double* sum_a,
                              double* sum_b, void* scratch) {
  NASDET_BY_STORAGE(pixels_sums<S>(a, map, image, block, sum_a, sum_b, scratch))
}
void norm_act_mix_pixels_backward(const NormActMixArgs& a, int64_t map, int64_t image, int64_t block, void* scratch) {
  NASDET_BY_STORAGE(pixels_backward<S>(a, map, image, block, scratch))
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include <cmath>
#include <memory>

#include "nasdet/checks.h"

namespace nasdet {
namespace {

constexpr int64_t kRowsPerMap = 6;  // most rows of per-channel scratch that a kernel uses

bool channels_last(const Tensor& x) {
  const int64_t C = x.size(1), W = x.size(3), H = x.size(2);
  if (C == 1 || H * W == 1) return false;  // both at once: treat as contiguous
  return x.stride(1) == 1 && (W == 1 || x.stride(3) == C) && (H == 1 || x.stride(2) == W * C) &&
         (x.size(0) == 1 || x.stride(0) == H * W * C);
}

// All that forward and backward share: the checked inputs in one layout, and the kernels' arguments.
struct Call {
  std::vector<Tensor> maps;
  std::vector<const void*> pointers;
  std::vector<int64_t> normalized;
  Tensor weights, gamma, beta;
  NormActMixArgs args{};
  int64_t blocks = 0;
  size_t arithmetic_size = 4;

  Call(const std::vector<Tensor>& xs, const Tensor& w, const Tensor& g, const Tensor& b, int64_t groups, double eps,
       const std::vector<int64_t>& flags)
      : normalized(flags),
        weights(torch::stable::contiguous(w)),
        gamma(torch::stable::contiguous(g)),
        beta(torch::stable::contiguous(b)) {
    STD_TORCH_CHECK(!xs.empty() && xs[0].dim() == 4, "xs must hold maps of shape (N, C, H, W)");
    const Tensor& first = xs[0];
    const int64_t P = xs.size(), C = first.size(1);
    for (const Tensor& x : xs)
      STD_TORCH_CHECK(same(x.sizes(), first.sizes()) && x.scalar_type() == first.scalar_type() && x.is_cpu(),
                      "xs must have one shape and dtype, on the CPU");
    const ScalarType arithmetic = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    for (const Tensor* t : {&weights, &gamma, &beta})
      STD_TORCH_CHECK(t->scalar_type() == arithmetic && t->is_cpu(),
                      "weights, gn_weight and gn_bias must be float32 (float64 for float64 maps) on the CPU");
    STD_TORCH_CHECK(
        weights.numel() == P && gamma.numel() == P * C && beta.numel() == P * C && int64_t(flags.size()) == P,
        "weights, gn_weight, gn_bias and normalized must have one row per map");
    STD_TORCH_CHECK(groups > 0 && C % groups == 0, "num_groups must divide the channels, got ", groups, " for ", C);
    const bool nhwc = channels_last(first);
    const Tensor like = nhwc || first.is_contiguous() ? first : torch::stable::contiguous(first);
    for (const Tensor& x : xs) maps.push_back(in_layout_of(x, like));
    for (const Tensor& x : maps) pointers.push_back(x.const_data_ptr());
    arithmetic_size = arithmetic == ScalarType::Double ? 8 : 4;
    args.xs = pointers.data();
    args.normalized = normalized.data();
    args.weights = weights.const_data_ptr();
    args.gamma = gamma.const_data_ptr();
    args.beta = beta.const_data_ptr();
    args.maps = P, args.batch = first.size(0), args.channels = C, args.pixels = first.size(2) * first.size(3);
    args.groups = groups, args.eps = eps;
    args.storage = storage_code(first, "xs");
    args.channels_last = nhwc;
    blocks = (args.pixels + kPixelBlock - 1) / kPixelBlock;
  }

  int64_t bytes() const { return maps[0].numel() * int64_t(maps[0].element_size()); }
  std::unique_ptr<char[]> scratch(int64_t elements) const {
    return std::unique_ptr<char[]>(new char[elements * arithmetic_size]);
  }
};

void set(void* array, int64_t index, double value, size_t size) {
  if (size == 8) static_cast<double*>(array)[index] = value;
  else static_cast<float*>(array)[index] = float(value);
}

void measure_pixels(Call& call) {
  NormActMixArgs& a = call.args;
  std::vector<Moments> partial(a.maps * a.batch * call.blocks * a.groups);
  const auto kernel = NASDET_KERNEL(norm_act_mix_pixels_moments);
  torch::stable::parallel_for(0, a.maps * a.batch * call.blocks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = call.scratch(kRowsPerMap * a.channels);
    for (int64_t t = begin; t < end; ++t)
      if (const int64_t row = t / call.blocks; call.normalized[row / a.batch])
        kernel(a, row / a.batch, row % a.batch, t % call.blocks, &partial[t * a.groups], scratch.get());
  });
  for (int64_t row = 0; row < a.maps * a.batch; ++row)
    for (int64_t g = 0; g < a.groups && call.normalized[row / a.batch]; ++g) {
      Moments all{0, 0, 0};
      for (int64_t block = 0; block < call.blocks; ++block)
        merge(all, partial[(row * call.blocks + block) * a.groups + g]);
      set(a.mean, row * a.groups + g, all.mean, call.arithmetic_size);
      set(a.rstd, row * a.groups + g, 1 / std::sqrt(all.m2 / all.count + a.eps), call.arithmetic_size);
    }
}

std::tuple<Tensor, Tensor, Tensor> norm_act_mix(std::vector<Tensor> xs, Tensor weights, Tensor gamma, Tensor beta,
                                                int64_t groups, double eps, std::vector<int64_t> normalized,
                                                bool /*overwrite_inputs: for backward */) {
  Call call(xs, weights, gamma, beta, groups, eps, normalized);
  NormActMixArgs& a = call.args;
  Tensor out = torch::stable::empty_like(call.maps[0]);
  Tensor mean = torch::stable::new_zeros(call.weights, {a.maps, a.batch, groups});
  Tensor rstd = torch::stable::new_zeros(call.weights, {a.maps, a.batch, groups});
  a.mean = mean.mutable_data_ptr(), a.rstd = rstd.mutable_data_ptr(), a.out = out.mutable_data_ptr();
  a.streaming = call.bytes() >= kStreamingBytes && aligned(out);
  if (out.numel() == 0) return {out, mean, rstd};
  if (a.channels_last) {
    measure_pixels(call);
    const auto kernel = NASDET_KERNEL(norm_act_mix_pixels_forward);
    torch::stable::parallel_for(0, a.batch * call.blocks, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = call.scratch(3 * a.maps * a.channels);
      for (int64_t t = begin; t < end; ++t) kernel(a, t / call.blocks, t % call.blocks, scratch.get());
    });
  } else {
    const auto kernel = NASDET_KERNEL(norm_act_mix_planes_forward);
    torch::stable::parallel_for(0, a.batch * groups, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = call.scratch(a.maps > 1 ? a.channels / groups * a.pixels : 0);
      for (int64_t t = begin; t < end; ++t) kernel(a, t, scratch.get());
    });
  }
  return {out, mean, rstd};
}

void pixels_gradients(Call& call) {
  NormActMixArgs& a = call.args;
  const int64_t tasks = a.maps * a.batch * call.blocks, rows = a.maps * a.batch;
  std::vector<double> partial(2 * tasks * a.channels);
  const auto sums = NASDET_KERNEL(norm_act_mix_pixels_sums);
  const auto apply = NASDET_KERNEL(norm_act_mix_pixels_backward);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = call.scratch(kRowsPerMap * a.channels);
    for (int64_t t = begin; t < end; ++t) {
      double* at = &partial[2 * t * a.channels];
      sums(a, t / call.blocks / a.batch, t / call.blocks % a.batch, t % call.blocks, at, at + a.channels,
           scratch.get());
    }
  });
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < call.blocks; ++block) {
      const double* at = &partial[2 * (row * call.blocks + block) * a.channels];
      for (int64_t c = 0; c < a.channels; ++c) {
        a.sum_a[row * a.channels + c] += at[c];
        a.sum_b[row * a.channels + c] += at[a.channels + c];
      }
    }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = call.scratch(kRowsPerMap * a.channels);
    for (int64_t t = begin; t < end; ++t)
      apply(a, t / call.blocks / a.batch, t / call.blocks % a.batch, t % call.blocks, scratch.get());
  });
}

// Gradients of weights, gamma and beta from the per-channel sums: dw = sum gamma B + beta A, dgamma = w B, dbeta = w A.
std::tuple<Tensor, Tensor, Tensor> parameter_gradients(const Call& call) {
  const NormActMixArgs& a = call.args;
  Tensor dweights = torch::stable::new_zeros(call.weights, {a.maps});
  Tensor dgamma = torch::stable::new_zeros(call.gamma, {a.maps, a.channels});
  Tensor dbeta = torch::stable::new_zeros(call.beta, {a.maps, a.channels});
  const auto get = [&](const void* array, int64_t i) {
    return call.arithmetic_size == 8 ? static_cast<const double*>(array)[i]
                                     : double(static_cast<const float*>(array)[i]);
  };
  for (int64_t p = 0; p < a.maps; ++p) {
    const double w = get(a.weights, p);
    double dw = 0;
    for (int64_t c = 0; c < a.channels; ++c) {
      double sum_a = 0, sum_b = 0;
      for (int64_t n = 0; n < a.batch; ++n) {
        sum_a += a.sum_a[(p * a.batch + n) * a.channels + c];
        sum_b += a.sum_b[(p * a.batch + n) * a.channels + c];
      }
      const int64_t at = p * a.channels + c;
      if (!call.normalized[p]) {
        dw += sum_b;
        continue;
      }
      dw += get(a.gamma, at) * sum_b + get(a.beta, at) * sum_a;
      set(dgamma.mutable_data_ptr(), at, w * sum_b, call.arithmetic_size);
      set(dbeta.mutable_data_ptr(), at, w * sum_a, call.arithmetic_size);
    }
    set(dweights.mutable_data_ptr(), p, dw, call.arithmetic_size);
  }
  return {dweights, dgamma, dbeta};
}

std::tuple<Tensor, Tensor, Tensor> backward_into(Call& call, const Tensor& grad, const Tensor& mean, const Tensor& rstd,
                                                 std::vector<Tensor>& dxs) {
  NormActMixArgs& a = call.args;
  STD_TORCH_CHECK(same(grad.sizes(), call.maps[0].sizes()) && grad.scalar_type() == call.maps[0].scalar_type(),
                  "grad must have the maps' shape and dtype");
  const Tensor g = in_layout_of(grad, call.maps[0]);
  const Tensor means = torch::stable::contiguous(mean);
  const Tensor rstds = torch::stable::contiguous(rstd);
  STD_TORCH_CHECK(means.numel() == a.maps * a.batch * a.groups && rstds.numel() == means.numel(),
                  "mean and rstd must have shape (maps, N, num_groups)");
  std::vector<void*> pointers;
  bool streaming = a.maps * call.bytes() >= kStreamingBytes;
  for (size_t p = 0; p < dxs.size(); ++p) {
    pointers.push_back(dxs[p].mutable_data_ptr());
    streaming &= aligned(dxs[p]) && pointers[p] != call.pointers[p];  // a map's own lines are in the cache already
  }
  std::vector<double> sums(2 * a.maps * a.batch * a.channels);
  a.grad = g.const_data_ptr();
  a.mean = const_cast<void*>(means.const_data_ptr());
  a.rstd = const_cast<void*>(rstds.const_data_ptr());
  a.dxs = pointers.data();
  a.sum_a = sums.data();
  a.sum_b = sums.data() + a.maps * a.batch * a.channels;
  a.streaming = streaming;
  if (g.numel()) {
    if (a.channels_last) {
      pixels_gradients(call);
    } else {
      const auto kernel = NASDET_KERNEL(norm_act_mix_planes_backward);
      torch::stable::parallel_for(0, a.batch * a.groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) kernel(a, t);
      });
    }
  }
  return parameter_gradients(call);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor> norm_act_mix_backward(Tensor grad, std::vector<Tensor> xs,
                                                                              Tensor weights, Tensor gamma, Tensor beta,
                                                                              Tensor mean, Tensor rstd, int64_t groups,
                                                                              std::vector<int64_t> normalized) {
  Call call(xs, weights, gamma, beta, groups, 0, normalized);
  std::vector<Tensor> dxs;
  for (size_t p = 0; p < xs.size(); ++p) dxs.push_back(torch::stable::empty_like(call.maps[0]));
  auto [dweights, dgamma, dbeta] = backward_into(call, grad, mean, rstd, dxs);
  return {dxs, dweights, dgamma, dbeta};
}

// As above, with each map's gradient written over the map.
std::tuple<Tensor, Tensor, Tensor> norm_act_mix_backward_inplace(Tensor grad, std::vector<Tensor> xs, Tensor weights,
                                                                 Tensor gamma, Tensor beta, Tensor mean, Tensor rstd,
                                                                 int64_t groups, std::vector<int64_t> normalized) {
  Call call(xs, weights, gamma, beta, groups, 0, normalized);
  std::vector<Tensor> dxs = call.maps;
  auto result = backward_into(call, grad, mean, rstd, dxs);
  for (size_t p = 0; p < xs.size(); ++p)
    if (call.maps[p].const_data_ptr() != xs[p].const_data_ptr())
      torch::stable::copy_(xs[p], call.maps[p]);  // was another layout
  return result;
}

}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("norm_act_mix", TORCH_BOX(&nasdet::norm_act_mix));
  m.impl("norm_act_mix_backward", TORCH_BOX(&nasdet::norm_act_mix_backward));
  m.impl("norm_act_mix_backward_", TORCH_BOX(&nasdet::norm_act_mix_backward_inplace));
}
#endif
