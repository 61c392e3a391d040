// The launcher of RoIAlign: checks, and the tasks of the threads.
#pragma once
#include "roi_align_work.h"

namespace nasdet {
namespace {

constexpr int64_t kPoolRois = 16;  // RoIs of one pooling task

// RoIs [begin, end) of the order and channels [first, last).
struct Task {
  int64_t begin, end, first, last;
  bool channels_last;
};

// Planes: all RoIs of one block of channels before the next block, so that a plane is fetched into the caches once.
std::vector<Task> pooling_tasks(const Plans& plans, const std::vector<Level>& levels, int64_t channels) {
  std::vector<Task> tasks, segments;
  const int64_t count = int64_t(plans.places.size());
  for (int64_t i = 0; i < count;) {
    int64_t end = i;
    const int32_t level = plans.places[i].level;
    while (end < count && end - i < kPoolRois && plans.places[end].level == level) ++end;
    (levels[level].channels_last ? tasks : segments).push_back({i, end, 0, channels, levels[level].channels_last});
    i = end;
  }
  for (int64_t c = 0; c < channels; c += kPlaneChannels)
    for (Task segment : segments) {
      segment.first = c;
      segment.last = std::min(channels, c + kPlaneChannels);
      tasks.push_back(segment);
    }
  return tasks;
}

template <class T>
void pool(const std::vector<Level>& levels, const Tensor& rois, const Pooling& p, Tensor& out, bool channels_last) {
  const int64_t batch = levels[0].map.size(0), channels = levels[0].map.size(1);
  const Plans plans = planned<T>(rois, batch, p, levels, false, [&](RoiWork& w, const Place& at, const Level& level) {
    const int64_t C = level.channels_last ? channels : 1, plane = level.height * level.width;
    w.in = element(level.map, at.image * channels * plane);
    w.in_end = element(level.map, level.map.numel());
    w.in_row = level.width * C;
    w.in_column = C;
    w.in_channel = level.channels_last ? 1 : plane;
    w.out = at.row * channels * p.bins();
    w.out_column = channels_last ? channels : 1;
    w.out_row = p.width * w.out_column;
    w.out_channel = channels_last ? 1 : p.bins();
    w.out_end = 0;
  });
  const bool streaming = out.numel() * int64_t(out.element_size()) >= kStreamingBytes && aligned(out);
  const bool pixels_aligned = channels * int64_t(out.element_size()) % 64 == 0;
  const std::vector<Task> tasks = pooling_tasks(plans, levels, channels);
  const auto pixels = NASDET_KERNEL(roi_align_pixels);
  const auto planes = NASDET_KERNEL(roi_align_planes);
  const int storage = storage_code(out, "features");
  const int64_t workers = threads();
  std::vector<std::vector<T>> scratch(static_cast<size_t>(workers),
                                      std::vector<T>(size_t(kPlaneChannels * p.bins() + 32)));
  for_tasks(int64_t(tasks.size()), workers, [&](int64_t worker, int64_t t) {
    const Task& task = tasks[size_t(t)];
    const RoiJob job{out.mutable_data_ptr(),
                     scratch[size_t(worker)].data(),
                     task.first,
                     task.last,
                     0,
                     p.bins(),
                     storage,
                     false,
                     streaming && (!task.channels_last || pixels_aligned)};
    (task.channels_last ? pixels : planes)(job, &plans.works[task.begin], task.end - task.begin);
  });
}

void check_features(const std::vector<Tensor>& features) {
  for (const Tensor& x : features) {
    STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && x.scalar_type() == features[0].scalar_type(),
                    "features must be 4-dimensional maps of one dtype on the CPU");
    STD_TORCH_CHECK(x.size(0) == features[0].size(0) && x.size(1) == features[0].size(1),
                    "features must have one batch size and one number of channels");
    STD_TORCH_CHECK(x.size(2) < (1 << 30) && x.size(3) < (1 << 30),
                    "features must have less than 2^30 rows and columns");
  }
}

Tensor multilevel_roi_align(std::vector<Tensor> features, Tensor rois, std::vector<double> scales,
                            int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio, bool aligned,
                            int64_t policy, double canonical_scale, int64_t canonical_level) {
  const Pooling pooling = checked_pooling(std::move(scales), int64_t(features.size()), pooled_height, pooled_width,
                                          sampling_ratio, aligned, policy, canonical_scale, canonical_level);
  check_features(features);
  storage_code(features[0], "features");
  check_rois(rois, features[0]);
  std::vector<Level> levels;
  for (const Tensor& x : features) {
    const bool nhwc = is_channels_last(x);
    levels.push_back({nhwc || x.is_contiguous() ? x : torch::stable::contiguous(x), x.size(2), x.size(3), nhwc});
  }
  const bool channels_last = levels[0].channels_last;
  Tensor out =
      empty_result({rois.size(0), features[0].size(1), pooled_height, pooled_width}, features[0], channels_last);
  const Tensor dense = torch::stable::contiguous(rois);
  if (features[0].scalar_type() == ScalarType::Double) pool<double>(levels, dense, pooling, out, channels_last);
  else pool<float>(levels, dense, pooling, out, channels_last);
  return out;
}

}  // namespace
}  // namespace nasdet
