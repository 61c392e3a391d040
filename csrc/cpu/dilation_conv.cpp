// nasdet::mixed_dilation_conv2d, nasdet::grouped_dilation_conv2d and their gradients: checks, layouts, and the choice among
// the algorithms of conv.h.
#ifdef NASDET_REGISTER
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "conv.h"
#include "results.h"
#include "scratch.h"

namespace nasdet {
namespace {

enum Choice : int64_t { kFastest = 0, kForceDirect = 1, kForceFrequency = 2, kForceWinograd = 3, kFastestExact = 4 };

const ConvAlgorithm* forced(int64_t choice) {
  const ConvAlgorithm* const all[] = {&kDirectConv, &kFrequencyConv, &kWinogradConv};
  STD_TORCH_CHECK(choice >= kFastest && choice <= kFastestExact, "algorithm must be 0 to 4, got ", choice);
  return choice >= kForceDirect && choice <= kForceWinograd ? all[choice - kForceDirect] : nullptr;
}

// Why the algorithm asked for cannot run the problem (the direct one where none is: it is the one that always can); null when it can.
const char* why_not(const ConvProblem& p, int64_t choice) {
  const ConvAlgorithm* const one = forced(choice);
  return (one ? one : &kDirectConv)->why_not(p);
}

const ConvAlgorithm& chosen(const ConvProblem& p, int64_t choice, bool backward) {
  const char* const reason = why_not(p, choice);
  STD_TORCH_CHECK(reason == nullptr, "algorithm '", (forced(choice) ? forced(choice) : &kDirectConv)->name,
                  "' cannot run this call: ", reason);
  if (forced(choice)) return *forced(choice);
  const ConvAlgorithm* best = &kDirectConv;
  double least = best->seconds(p, backward);
  for (const ConvAlgorithm* one : {&kFrequencyConv, &kWinogradConv}) {
    if ((choice == kFastestExact && one == &kWinogradConv) || one->why_not(p)) continue;
    const double seconds = one->seconds(p, backward);
    if (seconds < least) best = one, least = seconds;
  }
  return *best;
}

int64_t strided(int64_t size, int64_t stride) { return (size + stride - 1) / stride; }

// The problem without its branches; `weight` is [..., out_channels, in_channels / groups, k, k].
ConvProblem problem_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& dilations, int64_t stride_h,
                       int64_t stride_w, int64_t groups) {
  constexpr int64_t kMost = 1 << 30;
  const int64_t d = weight.dim();
  STD_TORCH_CHECK(
      x.dim() == 4 && x.is_cpu() && x.size(2) > 0 && x.size(3) > 0 && x.size(2) < kMost && x.size(3) < kMost,
      "x must have shape (N, Cin, H, W) and be on the CPU");
  STD_TORCH_CHECK(on_device_of(weight, x) && weight.scalar_type() == x.scalar_type(),
                  "weight must have the dtype and the device of x");
  STD_TORCH_CHECK(weight.size(d - 1) == weight.size(d - 2) && weight.size(d - 1) % 2 == 1 && weight.size(d - 1) < 256,
                  "weight must have a square kernel of odd size");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0 && weight.size(d - 4) % groups == 0 && weight.size(d - 4) > 0 &&
                      weight.size(d - 3) > 0 && weight.size(d - 3) * groups == x.size(1),
                  "weight must have ", x.size(1), " / groups input channels, and groups divide both channels, got ",
                  weight.size(d - 3), " and groups = ", groups);
  STD_TORCH_CHECK(stride_h > 0 && stride_w > 0 && stride_h < kMost && stride_w < kMost,
                  "stride must be positive and below 2^30, got ", stride_h, " and ", stride_w);
  STD_TORCH_CHECK(!dilations.empty() && dilations.size() % 2 == 0, "dilations must be pairs, got ", dilations.size(),
                  " numbers");
  for (int64_t dilation : dilations)
    STD_TORCH_CHECK(dilation > 0 && dilation < kMost, "dilations must be positive and below 2^30, got ", dilation);
  return {x.size(0),
          x.size(1),
          weight.size(d - 4),
          groups,
          x.size(2),
          x.size(3),
          strided(x.size(2), stride_h),
          strided(x.size(3), stride_w),
          int32_t(weight.size(d - 1)),
          int32_t(stride_h),
          int32_t(stride_w),
          storage_code(x, "x"),
          {}};
}

char* data_of(const std::optional<Tensor>& t) { return t ? static_cast<char*>(t->mutable_data_ptr()) : nullptr; }

// A branch for each dilation over all channels. `dweight` and `dmix` are like `weight` and `mix`, or not wanted.
void add_mixture(ConvProblem& p, const std::vector<int64_t>& dilations, const Tensor& weight, const Tensor& mix,
                 const std::optional<Tensor>& dweight, const std::optional<Tensor>& dmix) {
  const int64_t kernel_bytes = weight.size(1) * weight.size(2) * p.kernel * p.kernel * weight.element_size();
  const int64_t mix_bytes = mix.size(1) * mix.element_size();
  char *dw = data_of(dweight), *dm = data_of(dmix);
  for (int64_t g = 0; g < weight.size(0); ++g)
    p.branches.push_back({0, p.out_channels, int32_t(dilations[2 * g]), int32_t(dilations[2 * g + 1]),
                          static_cast<const char*>(weight.const_data_ptr()) + g * kernel_bytes,
                          static_cast<const char*>(mix.const_data_ptr()) + g * mix_bytes,
                          dw ? dw + g * kernel_bytes : nullptr, dm ? dm + g * mix_bytes : nullptr});
}

// A branch for each slice of the channels.
void add_slices(ConvProblem& p, const std::vector<int64_t>& dilations, const std::vector<int64_t>& splits,
                const Tensor& weight, const std::optional<Tensor>& dweight) {
  STD_TORCH_CHECK(2 * splits.size() == dilations.size(), "splits must have one number per dilation, got ",
                  splits.size());
  const int64_t row_bytes = weight.size(1) * p.kernel * p.kernel * weight.element_size();
  const int64_t per_group = p.out_channels / p.groups;
  char* const dw = data_of(dweight);
  int64_t first = 0;
  for (size_t s = 0; s < splits.size(); ++s) {
    STD_TORCH_CHECK(
        splits[s] > 0 && splits[s] <= p.out_channels - first && (p.groups == 1 || splits[s] % per_group == 0),
        "splits must be positive, sum to the ", p.out_channels, " output channels and cut no group, got ", splits[s]);
    p.branches.push_back({first, first + splits[s], int32_t(dilations[2 * s]), int32_t(dilations[2 * s + 1]),
                          static_cast<const char*>(weight.const_data_ptr()) + first * row_bytes, nullptr,
                          dw ? dw + first * row_bytes : nullptr, nullptr});
    first += splits[s];
  }
  STD_TORCH_CHECK(first == p.out_channels, "splits must sum to the ", p.out_channels, " output channels, got ", first);
}

void check_mix(const Tensor& x, const Tensor& weight, const Tensor& mix, const std::vector<int64_t>& dilations) {
  STD_TORCH_CHECK(weight.dim() == 5 && 2 * weight.size(0) == int64_t(dilations.size()),
                  "weight must have shape (G, Cout, Cin / groups, k, k) with a kernel per dilation");
  STD_TORCH_CHECK(
      on_device_of(mix, x) && mix.dim() == 2 && mix.size(0) == weight.size(0) && mix.size(1) == weight.size(1),
      "mix must have shape (G, Cout) and be on the device of x");
  STD_TORCH_CHECK(mix.scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
                  "mix must be float32 (float64 for float64 maps)");
}

void check_grad(const ConvProblem& p, const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(on_device_of(grad, x) && grad.scalar_type() == x.scalar_type() && grad.dim() == 4 &&
                      grad.size(0) == p.images && grad.size(1) == p.out_channels && grad.size(2) == p.out_height &&
                      grad.size(3) == p.out_width,
                  "grad must be like the result");
}

Tensor run_forward(const ConvProblem& p, const Tensor& x, int64_t choice) {
  const bool nhwc = is_channels_last(x);
  Tensor y = empty_result({p.images, p.out_channels, p.out_height, p.out_width}, x, true);
  if (y.numel() > 0) {
    const Tensor maps = lying_as(x, true);
    chosen(p, choice, false).forward(p, maps.const_data_ptr(), y.mutable_data_ptr());
  }
  return nhwc ? y : lying_as(y, false);
}

void clear(const std::optional<Tensor>& t) {
  if (t && t->numel() > 0) std::memset(t->mutable_data_ptr(), 0, size_t(t->numel()) * t->element_size());
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// The gradient of x, or an empty tensor where it is not wanted; those of the weights go where the branches say.
Tensor run_backward(ConvProblem& p, const Tensor& grad, const Tensor& x, int64_t choice, bool need_x) {
  const bool nhwc = is_channels_last(x);
  p.input_grad = need_x;
  if (p.images == 0) return need_x ? empty_map({0, p.in_channels, p.height, p.width}, x, nhwc) : nothing(x);
  Tensor dx = need_x ? empty_result({p.images, p.in_channels, p.height, p.width}, x, true) : nothing(x);
  const Tensor maps = lying_as(x, true), upstream = lying_as(grad, true);
  chosen(p, choice, true)
      .backward(p, maps.const_data_ptr(), upstream.const_data_ptr(), need_x ? dx.mutable_data_ptr() : nullptr);
  return nhwc || !need_x ? dx : lying_as(dx, false);
}

Tensor mixed_dilation_conv2d(Tensor x, Tensor weight, Tensor mix, std::vector<int64_t> dilations, int64_t stride_h,
                             int64_t stride_w, int64_t groups, int64_t algorithm) {
  check_mix(x, weight, mix, dilations);
  ConvProblem p = problem_of(x, weight, dilations, stride_h, stride_w, groups);
  const Tensor kernels = torch::stable::contiguous(weight), factors = torch::stable::contiguous(mix);
  add_mixture(p, dilations, kernels, factors, std::nullopt, std::nullopt);
  return run_forward(p, x, algorithm);
}

std::tuple<Tensor, Tensor, Tensor> mixed_dilation_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor mix,
                                                                  std::vector<int64_t> dilations, int64_t stride_h,
                                                                  int64_t stride_w, int64_t groups, int64_t algorithm,
                                                                  bool need_x, bool need_weight, bool need_mix) {
  check_mix(x, weight, mix, dilations);
  ConvProblem p = problem_of(x, weight, dilations, stride_h, stride_w, groups);
  check_grad(p, grad, x);
  const Tensor kernels = torch::stable::contiguous(weight), factors = torch::stable::contiguous(mix);
  std::optional<Tensor> dweight, dmix;
  if (need_weight) dweight = on_huge_pages(torch::stable::empty_like(kernels));
  if (need_mix) dmix = torch::stable::empty_like(factors);
  if (p.images == 0) clear(dweight), clear(dmix);
  add_mixture(p, dilations, kernels, factors, dweight, dmix);
  const Tensor dx = run_backward(p, grad, x, algorithm, need_x);
  return {dx, dweight ? *dweight : nothing(x), dmix ? *dmix : nothing(mix)};
}

Tensor grouped_dilation_conv2d(Tensor x, Tensor weight, std::vector<int64_t> dilations, std::vector<int64_t> splits,
                               int64_t stride_h, int64_t stride_w, int64_t groups, int64_t algorithm) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have shape (Cout, Cin / groups, k, k)");
  ConvProblem p = problem_of(x, weight, dilations, stride_h, stride_w, groups);
  const Tensor kernels = torch::stable::contiguous(weight);
  add_slices(p, dilations, splits, kernels, std::nullopt);
  return run_forward(p, x, algorithm);
}

std::tuple<Tensor, Tensor> grouped_dilation_conv2d_backward(Tensor grad, Tensor x, Tensor weight,
                                                            std::vector<int64_t> dilations, std::vector<int64_t> splits,
                                                            int64_t stride_h, int64_t stride_w, int64_t groups,
                                                            int64_t algorithm, bool need_x, bool need_weight) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have shape (Cout, Cin / groups, k, k)");
  ConvProblem p = problem_of(x, weight, dilations, stride_h, stride_w, groups);
  check_grad(p, grad, x);
  const Tensor kernels = torch::stable::contiguous(weight);
  std::optional<Tensor> dweight;
  if (need_weight) dweight = on_huge_pages(torch::stable::empty_like(kernels));
  if (p.images == 0) clear(dweight);
  add_slices(p, dilations, splits, kernels, dweight);
  const Tensor dx = run_backward(p, grad, x, algorithm, need_x);
  return {dx, dweight ? *dweight : nothing(x)};
}

// The name of the algorithm that a call would run, the forward where no gradient is needed, or an empty one and why the
// algorithm asked for cannot.
std::tuple<std::string, std::string> dilation_conv_choice(Tensor x, Tensor weight, std::vector<int64_t> dilations,
                                                          std::vector<int64_t> splits, int64_t stride_h,
                                                          int64_t stride_w, int64_t groups, int64_t algorithm,
                                                          bool need_x, bool need_weight) {
  ConvProblem p = problem_of(x, weight, dilations, stride_h, stride_w, groups);
  p.input_grad = need_x;
  std::optional<Tensor> wanted;  // only whether it is there matters
  if (need_weight) wanted = weight;
  if (splits.empty()) {
    STD_TORCH_CHECK(weight.dim() == 5 && 2 * weight.size(0) == int64_t(dilations.size()),
                    "weight must have shape (G, Cout, Cin / groups, k, k) with a kernel per dilation");
    add_mixture(p, dilations, weight, weight, wanted, wanted);
  } else {
    add_slices(p, dilations, splits, weight, wanted);
  }
  if (const char* const reason = why_not(p, algorithm)) return {"", reason};
  return {chosen(p, algorithm, need_x || need_weight).name, ""};
}

}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_FRAGMENT(nasdet, m) {
  m.def(
      "_dilation_conv_choice(Tensor x, Tensor weight, int[] dilations, int[] splits, int stride_h, int stride_w, int "
      "groups, int algorithm, bool need_x, bool need_weight) -> (str, str)");
}
STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("_dilation_conv_choice", TORCH_BOX(&nasdet::dilation_conv_choice));
  m.impl("mixed_dilation_conv2d", TORCH_BOX(&nasdet::mixed_dilation_conv2d));
  m.impl("mixed_dilation_conv2d_backward", TORCH_BOX(&nasdet::mixed_dilation_conv2d_backward));
  m.impl("grouped_dilation_conv2d", TORCH_BOX(&nasdet::grouped_dilation_conv2d));
  m.impl("grouped_dilation_conv2d_backward", TORCH_BOX(&nasdet::grouped_dilation_conv2d_backward));
}
#endif
