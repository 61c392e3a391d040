// The launcher of the gradient of RoIAlign: maps are cut into tasks that own their pixels.
#pragma once
#include "roi_align_work.h"

namespace nasdet {
namespace {

constexpr int64_t kClearBytes = 1 << 20;
constexpr int64_t kReachBytes = 1 << 12;  // maps are cleared in pieces of so many bytes, by whether RoIs reach them
constexpr int64_t kRowParts = 8;          // pieces of a map per thread

// RoIs [begin, end) of the order, all on one map: image `image` of level `level`.
struct Group {
  int64_t begin, end, image;
  int32_t level;
};

std::vector<Group> groups_of(const std::vector<Place>& places) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < int64_t(places.size()); ++i) {
    const Place& at = places[i];
    if (groups.empty() || groups.back().level != at.level || groups.back().image != at.image)
      groups.push_back({i, i, at.image, at.level});
    groups.back().end = i + 1;
  }
  return groups;
}

// What no RoI reaches is written once and read by nobody here: past the caches, whole lines at a time.
void clear_untouched(char* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t head = std::min(bytes, int64_t(-reinterpret_cast<uintptr_t>(from) % kLine));
  const int64_t lines = (bytes - head) / kLine;
  std::memset(from, 0, size_t(head));
  float* at = reinterpret_cast<float*>(from + head);
  for (const float* end = at + lines * (kLine / int64_t(sizeof(float))); at < end; at += baseline::kLanes<float>)
    baseline::store_streaming(at, baseline::vec<float>{});
  std::memset(at, 0, size_t(bytes - head - lines * kLine));
}

void clear(const std::vector<std::pair<char*, int64_t>>& pieces) {
  for_ranges(int64_t(pieces.size()), threads(), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) clear_untouched(pieces[i].first, pieces[i].second);
    baseline::streaming_fence();
  });
}

// What a task of the gradient owns: channels [first, last) of rows [top, bottom) of one image on one level.
struct GradientTask {
  const Group* group;
  int64_t first, last, top, bottom;
};

// A task adds its RoIs in their order, so that a pixel's sum is the same however the work is cut. 16-bit maps are summed in
// float32 and rounded once.
template <class T> struct MapGradient {
  const Plans& plans;
  const std::vector<Level>& levels;
  int64_t channels, bins;
  int storage;
  bool narrow;

  void operator()(const GradientTask& task, std::vector<T>& sums) const {
    const Group& group = *task.group;
    const Level& level = levels[group.level];
    const int64_t plane = level.height * level.width;
    const int64_t image = group.image * channels * plane;
    const int64_t size = int64_t(level.map.element_size());
    char* map = static_cast<char*>(level.map.mutable_data_ptr()) + image * size;
    const int64_t first = task.first, last = task.last;
    RoiJob job{map, nullptr, first, last, 0, bins, storage, true, false};
    if (level.channels_last && !narrow) return add_rows(job, task, level.width * channels * size, map);
    if (narrow) {
      sums.assign(size_t((level.channels_last ? kPixelChannels : last - first) * plane), T(0));
      job.out = sums.data();
      job.out_first = first;
    } else {
      std::memset(map + first * plane * size, 0, size_t((last - first) * plane * size));
    }
    (level.channels_last ? NASDET_KERNEL(roi_align_pixels) : NASDET_KERNEL(roi_align_planes))(
        job, &plans.works[group.begin], group.end - group.begin);
    if constexpr (sizeof(T) == 4)
      if (narrow) {
        if (level.channels_last)
          NASDET_KERNEL(roi_align_narrow)(storage, sums.data(), std::min(channels, kPixelChannels), map + first * size,
                                          channels, plane, last - first);
        else
          NASDET_KERNEL(roi_align_narrow)(storage, sums.data(), 0, map + first * plane * size, 0, 1,
                                          (last - first) * plane);
      }
  }

  // Which pieces of a task's rows RoIs reach, each so many pixels.
  struct Reach {
    int64_t pixels, pieces;
    std::vector<bool> rows;
  };

  Reach reach(const GradientTask& task, const Level& level) const {
    const int64_t pixels = std::max<int64_t>(1, kReachBytes / std::max<int64_t>(1, channels * int64_t(sizeof(T))));
    const int64_t pieces = (level.width + pixels - 1) / pixels;
    Reach found{pixels, pieces, std::vector<bool>(size_t((task.bottom - task.top) * pieces))};
    for (int64_t i = task.group->begin; i < task.group->end; ++i) {
      const RoiSums &y = plans.works[i].y, &x = plans.works[i].x;
      if (x.count == 0) continue;
      const int64_t left = x.out[0] / pixels, right = x.out[x.count - 1] / pixels;
      for (const int32_t* row = std::lower_bound(y.out, y.out + y.count, int32_t(task.top));
           row < y.out + y.count && *row < task.bottom; ++row)
        std::fill_n(found.rows.begin() + (*row - task.top) * pieces + left, right - left + 1, true);
    }
    return found;
  }

  static void clear_row(const Reach& reach, int64_t row, char* at, int64_t bytes, int64_t pixel_bytes) {
    const auto first = reach.rows.begin() + row * reach.pieces, last = first + reach.pieces;
    for (auto from = first; from < last;) {
      const auto to = std::find(from, last, !*from);
      const int64_t begin = (from - first) * reach.pixels * pixel_bytes;
      const int64_t end = std::min(bytes, (to - first) * reach.pixels * pixel_bytes);
      if (*from) std::memset(at + begin, 0, size_t(end - begin));
      else clear_untouched(at + begin, end - begin);
      from = to;
    }
  }

  // Rows are cleared when the first RoI reaches them, from above down as the RoIs are ordered: so they are still in the
  // caches when it adds to them.
  void add_rows(const RoiJob& job, const GradientTask& task, int64_t row_bytes, char* map) const {
    const Level& level = levels[task.group->level];
    const Reach reached = reach(task, level);
    int64_t cleared = task.top;
    const auto clear_to = [&](int64_t row) {
      for (; cleared < row; ++cleared)
        clear_row(reached, cleared - task.top, map + cleared * row_bytes, row_bytes, channels * int64_t(sizeof(T)));
    };
    for (int64_t i = task.group->begin; i < task.group->end; ++i) {
      RoiWork work = plans.works[i];
      const int32_t *begin = work.y.out, *end = begin + work.y.count;
      const int32_t* first = std::lower_bound(begin, end, int32_t(task.top));
      const int32_t* last = std::lower_bound(first, end, int32_t(task.bottom));
      if (first == last) continue;
      clear_to(last[-1] + 1);
      work.y.out = first;
      work.y.first += first - begin;
      work.y.count = int32_t(last - first);
      NASDET_KERNEL(roi_align_pixels)(job, &work, 1);
    }
    clear_to(task.bottom);
    baseline::streaming_fence();
  }
};

// Maps of pixels are cut into rows, all channels side by side; planes, and 16-bit maps with their sums, into channels.
std::vector<GradientTask> gradient_tasks(const std::vector<Group>& groups, const std::vector<Level>& levels,
                                         int64_t channels, bool narrow) {
  const int64_t parts = threads() > 1 ? kRowParts * threads() : 1;
  std::vector<GradientTask> tasks;
  for (const Group& group : groups) {  // finest level first: small pieces come last
    const Level& level = levels[group.level];
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t top = level.height * part / parts, bottom = level.height * (part + 1) / parts;
      if (level.channels_last && !narrow && top < bottom) tasks.push_back({&group, 0, channels, top, bottom});
    }
  }
  for (int64_t c = 0; c < channels; ++c)
    for (const Group& group : groups) {
      const Level& level = levels[group.level];
      if (level.channels_last && !narrow) continue;
      const int64_t block = level.channels_last ? kPixelChannels : narrow ? kPlaneChannels / 2 : kPlaneChannels;
      if (c % block == 0) tasks.push_back({&group, c, std::min(channels, c + block), 0, level.height});
    }
  return tasks;
}

template <class T>
void add_up(const Tensor& grad_pixels, const Tensor& grad_planes, const Tensor& rois, int64_t batch, const Pooling& p,
            const std::vector<Level>& levels) {
  const int64_t channels = levels[0].map.size(1);
  const bool narrow = levels[0].map.element_size() == 2;
  const Plans plans = planned<T>(rois, batch, p, levels, true, [&](RoiWork& w, const Place& at, const Level& level) {
    const Tensor& grad = level.channels_last ? grad_pixels : grad_planes;
    const int64_t C = level.channels_last ? channels : 1;
    w.in = element(grad, at.row * channels * p.bins());
    w.in_end = element(grad, grad.numel());
    w.in_row = p.width * C;
    w.in_column = C;
    w.in_channel = level.channels_last ? 1 : p.bins();
    w.out = 0;
    w.out_column = level.channels_last && narrow ? std::min(channels, kPixelChannels) : C;
    w.out_row = level.width * w.out_column;
    w.out_channel = level.channels_last ? 1 : level.height * level.width;
    w.out_end = level.height * level.width;
  });
  const std::vector<Group> groups = groups_of(plans.places);
  std::vector<std::pair<char*, int64_t>> pieces;
  for (int32_t l = 0; l < int32_t(levels.size()); ++l)
    for (int64_t image = 0; image < batch; ++image) {
      const bool used =
          std::any_of(groups.begin(), groups.end(), [&](const Group& g) { return g.level == l && g.image == image; });
      if (used) continue;  // its tasks write all of it
      const int64_t bytes = channels * levels[l].height * levels[l].width * int64_t(levels[l].map.element_size());
      char* map = static_cast<char*>(levels[l].map.mutable_data_ptr()) + image * bytes;
      for (int64_t at = 0; at < bytes; at += kClearBytes)
        pieces.push_back({map + at, std::min(kClearBytes, bytes - at)});
    }
  clear(pieces);
  const MapGradient<T> gradient{plans, levels, channels, p.bins(), storage_code(levels[0].map, "grad"), narrow};
  const std::vector<GradientTask> tasks = gradient_tasks(groups, levels, channels, narrow);
  const int64_t workers = threads();
  std::vector<std::vector<T>> sums(static_cast<size_t>(workers));
  for_tasks(int64_t(tasks.size()), workers,
            [&](int64_t worker, int64_t t) { gradient(tasks[size_t(t)], sums[size_t(worker)]); });
}

std::vector<Tensor> multilevel_roi_align_backward(Tensor grad, Tensor rois, int64_t batch, std::vector<int64_t> heights,
                                                  std::vector<int64_t> widths, int64_t channels_last_mask,
                                                  std::vector<double> scales, int64_t pooled_height,
                                                  int64_t pooled_width, int64_t sampling_ratio, bool aligned,
                                                  int64_t policy, double canonical_scale, int64_t canonical_level,
                                                  bool /*deterministic: always*/) {
  const Pooling pooling = checked_pooling(std::move(scales), int64_t(heights.size()), pooled_height, pooled_width,
                                          sampling_ratio, aligned, policy, canonical_scale, canonical_level);
  check_rois(rois, grad);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.is_cpu() && grad.size(0) == rois.size(0) && grad.size(2) == pooled_height &&
                      grad.size(3) == pooled_width,
                  "grad must have shape (", rois.size(0), ", C, ", pooled_height, ", ", pooled_width, ") on the CPU");
  STD_TORCH_CHECK(widths.size() == heights.size() && heights.size() < 64,
                  "heights and widths must have one entry per level");
  std::vector<Level> levels;
  std::vector<Tensor> gradients;
  bool any_pixels = false, any_planes = false;
  for (size_t l = 0; l < heights.size(); ++l) {
    STD_TORCH_CHECK(heights[l] >= 0 && widths[l] >= 0 && heights[l] < (1 << 30) && widths[l] < (1 << 30),
                    "heights and widths must be in [0, 2^30)");
    const bool nhwc = channels_last_mask >> l & 1;
    gradients.push_back(empty_result({batch, grad.size(1), heights[l], widths[l]}, grad, nhwc));
    levels.push_back({gradients.back(), heights[l], widths[l], nhwc});
    (nhwc ? any_pixels : any_planes) = true;
  }
  const Tensor dense = torch::stable::contiguous(rois);
  const Tensor grad_pixels = any_pixels ? lying_as(grad, true) : grad;
  const Tensor grad_planes = any_planes ? lying_as(grad, false) : grad;
  if (grad.scalar_type() == ScalarType::Double) add_up<double>(grad_pixels, grad_planes, dense, batch, pooling, levels);
  else add_up<float>(grad_pixels, grad_planes, dense, batch, pooling, levels);
  return gradients;
}

}  // namespace
}  // namespace nasdet
