// Launches the kernels of roi_align*.cuh for nasdet::multilevel_roi_align and nasdet::multilevel_roi_align_backward. All
// levels take one launch; nothing here waits for the device, so that CUDA graphs can record both.
#include "roi_align.cuh"

#include <algorithm>
#include <cmath>
#include <vector>

#include "launch.h"
#include "nasdet/op_checks.h"
#include "roi_align_gather.cuh"
#include "roi_align_scatter.cuh"

namespace nasdet::cuda {
namespace {

constexpr int64_t kMostBlocks = 65535;  // of a grid's y axis; blocks walk what is beyond
constexpr int64_t kFullDevice = 2048;   // blocks that fill any device
constexpr int64_t kItemsPerThread = 8;  // outputs of a thread, where RoIs are many
constexpr int64_t kMostInt = (int64_t(1) << 31) - 1;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The CPU's checks, and what the kernels' indices can hold.
Pooling checked_for_cuda(std::vector<double> scales, int64_t levels, int64_t height, int64_t width,
                         int64_t sampling_ratio, bool aligned, int64_t policy, double canonical_scale,
                         int64_t canonical_level) {
  Pooling p = checked_pooling(std::move(scales), levels, height, width, sampling_ratio, aligned, policy,
                              canonical_scale, canonical_level);
  STD_TORCH_CHECK(levels <= kMaxLevels, "features must hold 1 to ", kMaxLevels, " levels on CUDA, got ", levels);
  STD_TORCH_CHECK(height + width <= kMostBins, "pooled_height and pooled_width must be at most ", kMostBins,
                  " together on CUDA, got ", height, " and ", width);
  return p;
}

void check_cuda_rois(const Tensor& rois, const Tensor& like) {
  check_rois(rois, like);
  STD_TORCH_CHECK(rois.size(0) <= kMostInt, "rois must have fewer than 2^31 rows, got ", rois.size(0));
}

template <class T>
RoiMaps<T> described(const Pooling& p, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                     int64_t images, int64_t channels) {
  RoiMaps<T> maps{};
  maps.levels = int32_t(heights.size());
  for (int l = 0; l < maps.levels; ++l) {
    STD_TORCH_CHECK(heights[l] >= 0 && widths[l] >= 0 && heights[l] <= kMostInt && widths[l] <= kMostInt,
                    "maps must have sides below 2^31, got ", heights[l], " x ", widths[l]);
    maps.height[l] = int32_t(heights[l]), maps.width[l] = int32_t(widths[l]), maps.scale[l] = T(p.scales[l]);
  }
  STD_TORCH_CHECK(images <= kMostInt && channels * p.height * p.width <= kMostInt,
                  "the batch and one RoI's result must have fewer than 2^31 elements");
  maps.rule = p.rule;
  maps.images = int32_t(images), maps.channels = int32_t(channels);
  maps.pooled_height = int32_t(p.height);
  maps.pooled_width = int32_t(p.width);
  maps.sampling_ratio = int32_t(p.sampling_ratio);
  maps.aligned = p.aligned;
  return maps;
}

// Parts into which the work on a RoI is cut: `usual`, more where RoIs are too few to fill the device, never over `most`.
int64_t parts_of(int64_t rois, int64_t usual, int64_t most) {
  return std::max<int64_t>(1, std::min(most, std::max(usual, divide_up(kFullDevice, rois))));
}

template <class S, int kWidth, bool kNhwc>
void launch_forward(const RoiMaps<arithmetic_t<S>>& maps, const Tensor& rois, Tensor& out, cudaStream_t stream) {
  using T = arithmetic_t<S>;
  const int64_t count = rois.size(0), bins = maps.pooled_height + maps.pooled_width;
  const int64_t items = int64_t(maps.pooled_height) * maps.pooled_width * divide_up(maps.channels, kWidth);
  const int64_t parts = parts_of(count, items / (kRoiThreads * kItemsPerThread), divide_up(items, kRoiThreads));
  const int64_t share = divide_up(items, parts);
  const int capacity = tap_capacity<T>(bins, maps.sampling_ratio);
  const dim3 grid(unsigned(divide_up(items, share)), unsigned(std::min(count, kMostBlocks)));
  roi_align_forward_kernel<S, kWidth, kNhwc><<<grid, kRoiThreads, size_t(tap_bytes<T>(bins, capacity)), stream>>>(
      maps, static_cast<const T*>(rois.const_data_ptr()), static_cast<S*>(out.mutable_data_ptr()), count, int(share),
      capacity);
  check_launch("roi_align_forward_kernel");
}

Tensor multilevel_roi_align(std::vector<Tensor> features, Tensor rois, std::vector<double> scales,
                            int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio, bool aligned,
                            int64_t policy, double canonical_scale, int64_t canonical_level) {
  const Pooling p = checked_for_cuda(std::move(scales), int64_t(features.size()), pooled_height, pooled_width,
                                     sampling_ratio, aligned, policy, canonical_scale, canonical_level);
  const Tensor first = features[0];
  for (const Tensor& x : features) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == first.size(0) && x.size(1) == first.size(1),
                    "features must have shape (N, C, H, W) with one N and C");
    STD_TORCH_CHECK(
        x.scalar_type() == first.scalar_type() && x.is_cuda() && x.get_device_index() == first.get_device_index(),
        "features must have one dtype and be on one CUDA device");
  }
  check_cuda_rois(rois, first);
  const DeviceGuard guard(first.get_device_index());
  const bool nhwc = is_channels_last(first);
  Tensor out = empty_map({rois.size(0), first.size(1), p.height, p.width}, first, nhwc);
  if (out.numel() == 0) return out;
  std::vector<int64_t> heights, widths;
  bool aligned16_all = aligned16(out.const_data_ptr());
  for (Tensor& x : features) {
    x = lying_as(x, nhwc);
    heights.push_back(x.size(2)), widths.push_back(x.size(3));
    aligned16_all &= aligned16(x.const_data_ptr());
  }
  const Tensor boxes = torch::stable::contiguous(rois);
  const cudaStream_t stream = current_stream(out);
  with_storage(out, "features", [&](auto zero) {
    using S = decltype(zero);
    auto maps = described<arithmetic_t<S>>(p, heights, widths, first.size(0), first.size(1));
    for (size_t l = 0; l < features.size(); ++l) maps.map[l] = features[l].const_data_ptr();
    if (!nhwc) launch_forward<S, 4, false>(maps, boxes, out, stream);
    else if (aligned16_all && maps.channels % kWide<S> == 0)
      launch_forward<S, kWide<S>, true>(maps, boxes, out, stream);
    else launch_forward<S, 1, true>(maps, boxes, out, stream);
  });
  return out;
}

template <class S, int kWidth, bool kNhwc>
void launch_scatter(const RoiMaps<arithmetic_t<S>>& maps, const Tensor& rois, const Tensor& grad, cudaStream_t stream) {
  using T = arithmetic_t<S>;
  const int64_t count = rois.size(0), groups = divide_up(maps.channels, kWidth);
  const int64_t parts = parts_of(count, divide_up(groups, 32), divide_up(groups, 8)), share = divide_up(groups, parts);
  const dim3 grid(unsigned(divide_up(groups, share)), unsigned(std::min(count, kMostBlocks)));
  roi_align_scatter_kernel<S, kWidth, kNhwc>
      <<<grid, kRoiThreads, size_t(scatter_bytes<T>(maps.pooled_height, maps.pooled_width)), stream>>>(
          maps, static_cast<const T*>(rois.const_data_ptr()), static_cast<const S*>(grad.const_data_ptr()), count,
          int(share));
  check_launch("roi_align_scatter_kernel");
}

void clear(void* memory, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  const cudaError_t error = cudaMemsetAsync(memory, 0, size_t(bytes), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "nasdet could not clear a gradient: ", cudaGetErrorString(error));
}

// 16-bit maps are summed in one float32 buffer and rounded once.
template <class S, int kWidth, bool kNhwc>
void scatter(RoiMaps<arithmetic_t<S>> maps, const Tensor& rois, const Tensor& grad, const std::vector<Tensor>& results,
             cudaStream_t stream) {
  if constexpr (sizeof(S) > 2) {
    for (const Tensor& result : results) clear(result.mutable_data_ptr(), result.numel() * int64_t(sizeof(S)), stream);
    if (rois.size(0)) launch_scatter<S, kWidth, kNhwc>(maps, rois, grad, stream);
  } else {
    RoiSums sums{};
    int64_t total = 0, largest = 0;
    for (size_t l = 0; l < results.size(); ++l) {
      sums.to[l] = results[l].mutable_data_ptr(), sums.count[l] = results[l].numel();
      total += divide_up(results[l].numel(), kRoundPack) * kRoundPack, largest = std::max(largest, results[l].numel());
    }
    const Tensor buffer = torch::stable::new_empty(rois, {total});
    float* at = static_cast<float*>(buffer.mutable_data_ptr());
    clear(at, total * int64_t(sizeof(float)), stream);
    for (size_t l = 0; l < results.size(); at += divide_up(sums.count[l], kRoundPack) * kRoundPack, ++l)
      sums.from[l] = at, maps.grad[l] = at;
    if (rois.size(0)) launch_scatter<S, kWidth, kNhwc>(maps, rois, grad, stream);
    const dim3 grid(unsigned(std::clamp<int64_t>(divide_up(largest, kRoundPack * kRoiThreads), 1, 1 << 16)),
                    unsigned(results.size()));
    roi_align_round_kernel<S><<<grid, kRoiThreads, 0, stream>>>(sums);
    check_launch("roi_align_round_kernel");
  }
}

template <class S, int kWidth, bool kNhwc>
void gather(RoiMaps<arithmetic_t<S>> maps, const Tensor& rois, const Tensor& grad, const std::vector<Tensor>&,
            cudaStream_t stream) {
  using T = arithmetic_t<S>;
  const int64_t count = rois.size(0);
  for (int l = 0; l < maps.levels; ++l)
    maps.first_tile[l + 1] = maps.first_tile[l] + tiles_of<kNhwc>(maps.images, maps.height[l], maps.width[l]);
  const int64_t tiles = maps.first_tile[maps.levels];
  const T* boxes = static_cast<const T*>(rois.const_data_ptr());
  const Tensor records = torch::stable::new_empty(rois, {count * int64_t(sizeof(Footprint) / sizeof(T))});
  Footprint* footprints = static_cast<Footprint*>(records.mutable_data_ptr());
  if (count) {
    roi_align_footprint_kernel<T>
        <<<unsigned(std::min(divide_up(count, kRoiThreads), kMostBlocks)), kRoiThreads, 0, stream>>>(maps, boxes,
                                                                                                     footprints, count);
    check_launch("roi_align_footprint_kernel");
  }
  const int hits = gather_hits<T, kNhwc>(maps.pooled_height, maps.pooled_width);
  const size_t bytes = size_t(hits * gather_bytes_per_hit<T, kNhwc>(maps.pooled_height, maps.pooled_width));
  const dim3 grid(unsigned(divide_up(maps.channels, kWidth * kGatherLanes<kNhwc>)),
                  unsigned(std::min(tiles, kMostBlocks)));
  roi_align_gather_kernel<S, kWidth, kNhwc><<<grid, kRoiThreads, bytes, stream>>>(
      maps, boxes, footprints, static_cast<const S*>(grad.const_data_ptr()), count, tiles, hits);
  check_launch("roi_align_gather_kernel");
}

template <class S, int kWidth, bool kNhwc, int kGatherWidth>
void either(bool deterministic, const RoiMaps<arithmetic_t<S>>& maps, const Tensor& rois, const Tensor& grad,
            const std::vector<Tensor>& results, cudaStream_t stream) {
  deterministic ? gather<S, kGatherWidth, kNhwc>(maps, rois, grad, results, stream)
                : scatter<S, kWidth, kNhwc>(maps, rois, grad, results, stream);
}

// The gradients of all levels in one layout.
void run_backward(bool deterministic, bool nhwc, const Pooling& p, const std::vector<int64_t>& heights,
                  const std::vector<int64_t>& widths, int64_t batch, const Tensor& rois, const Tensor& grad,
                  const std::vector<Tensor>& results) {
  const Tensor boxes = torch::stable::contiguous(rois), g = lying_as(grad, nhwc);
  bool aligned16_all = aligned16(g.const_data_ptr());
  for (const Tensor& result : results) aligned16_all &= aligned16(result.const_data_ptr());
  const cudaStream_t stream = current_stream(rois);
  with_storage(grad, "features", [&](auto zero) {
    using S = decltype(zero);
    constexpr int kGroup = sizeof(S) == 8 ? 2 : 4, kPlanes = sizeof(S) == 8 ? 8 : 16;
    auto maps = described<arithmetic_t<S>>(p, heights, widths, batch, grad.size(1));
    for (size_t l = 0; l < results.size(); ++l) maps.grad[l] = results[l].mutable_data_ptr();
    if (!nhwc) either<S, 4, false, kPlanes>(deterministic, maps, boxes, g, results, stream);
    else if (aligned16_all && maps.channels % kGroup == 0)
      either<S, kGroup, true, kGroup>(deterministic, maps, boxes, g, results, stream);
    else either<S, 1, true, 1>(deterministic, maps, boxes, g, results, stream);
  });
}

std::vector<Tensor> multilevel_roi_align_backward(Tensor grad, Tensor rois, int64_t batch, std::vector<int64_t> heights,
                                                  std::vector<int64_t> widths, int64_t channels_last_mask,
                                                  std::vector<double> scales, int64_t pooled_height,
                                                  int64_t pooled_width, int64_t sampling_ratio, bool aligned,
                                                  int64_t policy, double canonical_scale, int64_t canonical_level,
                                                  bool deterministic) {
  const Pooling p = checked_for_cuda(std::move(scales), int64_t(heights.size()), pooled_height, pooled_width,
                                     sampling_ratio, aligned, policy, canonical_scale, canonical_level);
  STD_TORCH_CHECK(widths.size() == heights.size(), "widths must have one number per level (", heights.size(), "), got ",
                  widths.size());
  STD_TORCH_CHECK(batch >= 0, "batch must not be negative, got ", batch);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.is_cuda() && grad.size(2) == p.height && grad.size(3) == p.width,
                  "grad must have shape (K, C, ", p.height, ", ", p.width, ")");
  check_cuda_rois(rois, grad);
  STD_TORCH_CHECK(grad.size(0) == rois.size(0), "grad must have one row per RoI (", rois.size(0), "), got ",
                  grad.size(0));
  const DeviceGuard guard(grad.get_device_index());
  std::vector<Tensor> results, work;
  int64_t total = 0;
  bool free = true, nhwc = false;  // `free`: no level so far has a layout that matters
  for (size_t l = 0; l < heights.size(); ++l) {
    const bool last = channels_last_mask >> l & 1;
    results.push_back(empty_map({batch, grad.size(1), heights[l], widths[l]}, grad, last));
    total += results[l].numel();
    const bool both = results[l].numel() == 0 || (lies_as(results[l], true) && lies_as(results[l], false));
    if (free && !both) nhwc = last, free = false;
  }
  if (total == 0) return results;
  for (const Tensor& result : results)  // a level in another layout than the first takes a copy
    work.push_back(result.numel() == 0 || lies_as(result, nhwc)
                       ? result
                       : empty_map({batch, grad.size(1), result.size(2), result.size(3)}, grad, nhwc));
  run_backward(deterministic, nhwc, p, heights, widths, batch, rois, grad, work);
  for (size_t l = 0; l < results.size(); ++l)
    if (work[l].const_data_ptr() != results[l].const_data_ptr()) torch::stable::copy_(results[l], work[l]);
  return results;
}

}  // namespace
}  // namespace nasdet::cuda

STABLE_TORCH_LIBRARY_IMPL(nasdet, CUDA, m) {
  m.impl("multilevel_roi_align", TORCH_BOX(&nasdet::cuda::multilevel_roi_align));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&nasdet::cuda::multilevel_roi_align_backward));
}
