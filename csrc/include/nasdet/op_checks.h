// Launcher-side checks that an op's CPU and CUDA forms share. Only for code under NASDET_REGISTER.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "nasdet/checks.h"
#include "nasdet/roi.h"

namespace nasdet {

inline bool on_device_of(const Tensor& t, const Tensor& like) {
  return t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() &&
         t.get_device_index() == like.get_device_index();
}

// What the NMS family is given; `leading` is 1 with a batch dimension, else 0.
inline void check_boxes(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& classes,
                        double threshold, int64_t leading) {
  const int64_t dim = leading + 2;
  STD_TORCH_CHECK(boxes.dim() == dim && boxes.size(dim - 1) == 4, "boxes must have shape ",
                  leading ? "(B, N, 4)" : "(N, 4)");
  storage_code(boxes, "boxes");
  STD_TORCH_CHECK(on_device_of(scores, boxes) && scores.scalar_type() == boxes.scalar_type(),
                  "scores must have the dtype and the device of boxes");
  STD_TORCH_CHECK(same(scores.sizes(), boxes.sizes().slice(0, size_t(dim - 1))),
                  "scores must have one value for each box");
  if (classes) {
    STD_TORCH_CHECK(on_device_of(*classes, boxes) && classes->scalar_type() == ScalarType::Long,
                    "classes must be int64 and on the device of boxes");
    STD_TORCH_CHECK(same(classes->sizes(), scores.sizes()), "classes must have one value for each box");
  }
  STD_TORCH_CHECK(threshold == threshold, "iou_threshold must be a number, got nan");
}

// What RoIAlign's schema says about pooling, checked.
struct Pooling {
  std::vector<double> scales;
  int64_t height, width, sampling_ratio;
  bool aligned;
  RoiLevels rule;
  int64_t bins() const { return height * width; }
};

inline Pooling checked_pooling(std::vector<double> scales, int64_t levels, int64_t height, int64_t width,
                               int64_t sampling_ratio, bool aligned, int64_t policy, double canonical_scale,
                               int64_t canonical_level) {
  constexpr int64_t kMostLevel = 1 << 30;
  STD_TORCH_CHECK(levels > 0 && int64_t(scales.size()) == levels,
                  "features and scales must have one entry per level, got ", levels, " and ", scales.size());
  for (double scale : scales)
    STD_TORCH_CHECK(scale > 0 && scale < 1e30, "scales must be positive and below 1e30, got ", scale);
  STD_TORCH_CHECK(height > 0 && width > 0 && height < (1 << 20) && width < (1 << 20),
                  "the pooled size must be positive and below 2^20, got ", height, " x ", width);
  STD_TORCH_CHECK(sampling_ratio < (int64_t(1) << 31), "sampling_ratio must fit 32 bits, got ", sampling_ratio);
  STD_TORCH_CHECK(policy == kRoiTorchvision || policy == kRoiDetectron2, "policy must be 0 or 1, got ", policy);
  STD_TORCH_CHECK(canonical_scale > 0, "canonical_scale must be positive, got ", canonical_scale);
  STD_TORCH_CHECK(canonical_level >= -kMostLevel && canonical_level <= kMostLevel,
                  "canonical_level must be within -2^30 and 2^30, got ", canonical_level);
  // Halves go to the even level, as in Python's reference. Each scale need not be half of the one before: whoever calls shifts canonical_level where the first map is of another level than its scale says.
  const int32_t k_min = -int32_t(std::nearbyint(std::log2(scales.front()))), k_max = k_min + int32_t(levels) - 1;
  return {std::move(scales),
          height,
          width,
          std::max<int64_t>(sampling_ratio, 0),
          aligned,
          {int32_t(policy), int32_t(canonical_level), k_min, k_max, float(canonical_scale)}};
}

inline void check_rois(const Tensor& rois, const Tensor& like) {
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "rois must have shape (K, 5)");
  STD_TORCH_CHECK(
      rois.scalar_type() == (like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
      "rois must be float32 (float64 for float64 features), got ScalarType ", int(rois.scalar_type()));
  STD_TORCH_CHECK(on_device_of(rois, like), "rois must be on the features' device");
}

// Whether the elements lie as in a dense NHWC (else NCHW) tensor; dimensions of size 1 do not count.
inline bool lies_as(const Tensor& t, bool nhwc) {
  constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (int d : kOrder[nhwc]) {
    if (t.size(d) > 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Dense as NHWC and not as NCHW too.
inline bool is_channels_last(const Tensor& t) { return t.numel() > 0 && !lies_as(t, false) && lies_as(t, true); }

inline Tensor empty_map(const std::vector<int64_t>& shape, const Tensor& like, bool nhwc) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `t` itself if it lies so, else a copy that does.
inline Tensor lying_as(const Tensor& t, bool nhwc) {
  if (t.numel() == 0 || lies_as(t, nhwc)) return t;
  Tensor copy = empty_map({t.size(0), t.size(1), t.size(2), t.size(3)}, t, nhwc);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace nasdet
