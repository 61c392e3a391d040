// Launches the kernels of mix.cuh for nasdet::mix and nasdet::mix_backward.
#include "mix.cuh"

#include <algorithm>
#include <tuple>
#include <vector>

#include "launch.h"

namespace nasdet::cuda {
namespace {

void check(const std::vector<Tensor>& xs, const Tensor& weights) {
  STD_TORCH_CHECK(!xs.empty(), "xs must hold at least one map, got none");
  const Tensor& first = xs[0];
  for (const Tensor& x : xs) {
    STD_TORCH_CHECK(same(x.sizes(), first.sizes()), "xs must have one shape");
    STD_TORCH_CHECK(
        x.scalar_type() == first.scalar_type() && x.is_cuda() && x.get_device_index() == first.get_device_index(),
        "xs must have one dtype and be on one CUDA device");
  }
  const ScalarType arithmetic = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(weights.scalar_type() == arithmetic, "weights must be float32 (float64 for float64 maps)");
  STD_TORCH_CHECK(weights.is_cuda() && weights.get_device_index() == first.get_device_index() && weights.dim() == 1 &&
                      weights.size(0) == int64_t(xs.size()),
                  "weights must have shape (", xs.size(), ",) and be on the maps' device");
}

std::vector<Tensor> all_in_layout_of(const std::vector<Tensor>& xs, const Tensor& like) {
  std::vector<Tensor> maps;
  for (const Tensor& x : xs) maps.push_back(in_layout_of(x, like));
  return maps;
}

template <class S, int kWidth>
void launch_forward(const std::vector<Tensor>& maps, const Tensor& weights, const Tensor& carry, Tensor& out,
                    cudaStream_t stream) {
  using T = arithmetic_t<S>;
  const int64_t count = out.numel(), total = maps.size();
  const unsigned blocks = unsigned(blocks_for(count / kWidth, kForwardPacks, kMostForwardBlocks));
  for (int64_t first = 0; first < total; first += kMaxMaps) {
    MixMaps group{};
    group.maps = int32_t(std::min<int64_t>(kMaxMaps, total - first));
    for (int p = 0; p < group.maps; ++p) group.x[p] = maps[first + p].const_data_ptr();
    T* sum = total > kMaxMaps ? static_cast<T*>(carry.mutable_data_ptr()) : nullptr;
    const bool last = first + kMaxMaps >= total;
    mix_forward_kernel<S, kWidth><<<blocks, kThreads, 0, stream>>>(
        group, static_cast<const T*>(weights.const_data_ptr()) + first, static_cast<S*>(out.mutable_data_ptr()),
        first ? sum : nullptr, last ? nullptr : sum, count);
    check_launch("mix_forward_kernel");
  }
}

Tensor mix(std::vector<Tensor> xs, Tensor weights) {
  check(xs, weights);
  Tensor out = torch::stable::empty_like(xs[0]);
  if (out.numel() == 0) return out;
  const DeviceGuard guard(out.get_device_index());
  const std::vector<Tensor> maps = all_in_layout_of(xs, out);
  const Tensor w = torch::stable::contiguous(weights);
  const Tensor carry = torch::stable::new_empty(w, {int64_t(maps.size()) > kMaxMaps ? out.numel() : 0});
  bool aligned = aligned16(out.const_data_ptr());
  for (const Tensor& map : maps) aligned &= aligned16(map.const_data_ptr());
  const cudaStream_t stream = current_stream(out);
  with_storage(out, "xs", [&](auto zero) {
    using S = decltype(zero);
    aligned ? launch_forward<S, kWide<S>>(maps, w, carry, out, stream)
            : launch_forward<S, 1>(maps, w, carry, out, stream);
  });
  return out;
}

template <class S, int kWidth>
void launch_backward(const Tensor& grad, const std::vector<Tensor>& maps, const Tensor& weights,
                     const std::vector<Tensor>& dxs, Tensor& dweights, cudaStream_t stream) {
  using T = arithmetic_t<S>;
  const int64_t count = grad.numel(), total = maps.size();
  const int64_t blocks = blocks_for(count / kWidth, kBackwardPacks, kMostBackwardBlocks);
  const bool need_weights = dweights.numel() > 0;
  const Tensor partial = torch::stable::new_empty(weights, {need_weights ? total * blocks : 0});
  T* rows = need_weights ? static_cast<T*>(partial.mutable_data_ptr()) : nullptr;
  for (int64_t first = 0; first < total; first += kMaxMaps) {
    MixMaps group{};
    group.maps = int32_t(std::min<int64_t>(kMaxMaps, total - first));
    for (int p = 0; p < group.maps; ++p) {
      group.x[p] = maps[first + p].const_data_ptr();
      group.dx[p] = dxs.empty() ? nullptr : dxs[first + p].mutable_data_ptr();
    }
    const dim3 grid(unsigned(blocks), unsigned((group.maps + kGroup - 1) / kGroup));
    mix_backward_kernel<S, kWidth><<<grid, kThreads, 0, stream>>>(
        group, static_cast<const T*>(weights.const_data_ptr()) + first, static_cast<const S*>(grad.const_data_ptr()),
        rows ? rows + first * blocks : nullptr, !dxs.empty(), count);
    check_launch("mix_backward_kernel");
  }
  if (!need_weights) return;
  mix_reduce_kernel<T>
      <<<unsigned(total), kThreads, 0, stream>>>(rows, static_cast<T*>(dweights.mutable_data_ptr()), blocks);
  check_launch("mix_reduce_kernel");
}

std::tuple<std::vector<Tensor>, Tensor> mix_backward(Tensor grad, std::vector<Tensor> xs, Tensor weights, bool need_xs,
                                                     bool need_weights) {
  check(xs, weights);
  STD_TORCH_CHECK(same(grad.sizes(), xs[0].sizes()) && grad.scalar_type() == xs[0].scalar_type() && grad.is_cuda() &&
                      grad.get_device_index() == xs[0].get_device_index(),
                  "grad must have the maps' shape and dtype and be on their device");
  const DeviceGuard guard(grad.get_device_index());
  const Tensor like = torch::stable::empty_like(xs[0]);
  std::vector<Tensor> dxs;
  for (size_t p = 0; need_xs && p < xs.size(); ++p) dxs.push_back(p == 0 ? like : torch::stable::empty_like(like));
  const Tensor w = torch::stable::contiguous(weights);
  Tensor dweights = torch::stable::new_empty(w, {need_weights ? int64_t(xs.size()) : 0});
  if (like.numel() == 0) return {dxs, torch::stable::zero_(dweights)};
  if (!need_xs && !need_weights) return {dxs, dweights};
  const std::vector<Tensor> maps =
      need_weights ? all_in_layout_of(xs, like) : dxs;  // without need_weights they are not read
  const Tensor g = in_layout_of(grad, like);
  bool aligned = aligned16(g.const_data_ptr());
  for (const Tensor& map : maps) aligned &= aligned16(map.const_data_ptr());
  for (const Tensor& dx : dxs) aligned &= aligned16(dx.const_data_ptr());
  const cudaStream_t stream = current_stream(g);
  with_storage(g, "xs", [&](auto zero) {
    using S = decltype(zero);
    aligned ? launch_backward<S, kWide<S>>(g, maps, w, dxs, dweights, stream)
            : launch_backward<S, 1>(g, maps, w, dxs, dweights, stream);
  });
  return {dxs, dweights};
}

}  // namespace
}  // namespace nasdet::cuda

STABLE_TORCH_LIBRARY_IMPL(nasdet, CUDA, m) {
  m.impl("mix", TORCH_BOX(&nasdet::cuda::mix));
  m.impl("mix_backward", TORCH_BOX(&nasdet::cuda::mix_backward));
}
