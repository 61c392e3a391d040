// The launchers of RoIAlign: checks, the order of the RoIs, and the tasks of the threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "results.h"
#include "roi_align_plan.h"
#include "tasks.h"

namespace nasdet {
namespace {

constexpr int64_t kPlanRois = 64;     // RoIs that one task plans
constexpr int64_t kPoolRois = 16;     // RoIs of one pooling task
constexpr int64_t kPlaneChannels = 16, kPixelChannels = 64;  // channels of one task
constexpr int64_t kClearBytes = 1 << 20;
constexpr int64_t kReachBytes = 1 << 12;  // maps are cleared in pieces of so many bytes, by whether RoIs reach them
constexpr int64_t kRowParts = 8;      // pieces of a map per thread
constexpr int32_t kBand = 16;         // RoIs are walked in bands of so many rows

// One level: its map, or the gradient of its map.
struct Level {
  Tensor map;
  int64_t height, width;
  bool channels_last;
};

struct Place {
  int32_t level, band, x;
  int64_t image, row;
  bool operator<(const Place& o) const {
    if (level != o.level) return level < o.level;
    if (image != o.image) return image < o.image;
    if (band != o.band) return band < o.band;
    if (x != o.x) return band & 1 ? x > o.x : x < o.x;  // to and fro
    return row < o.row;
  }
};

template <class T> int32_t pixel_of(T a, T b, double scale, int64_t size) {
  const double middle = 0.5 * (double(a) + double(b)) * scale;
  return middle > 0 ? middle < double(size) ? int32_t(middle) : int32_t(size) : 0;
}

template <class T> std::vector<Place> ordered(const T* rois, int64_t count, int64_t batch, const Pooling& pooling, const std::vector<Level>& levels) {
  std::vector<Place> places;
  places.reserve(size_t(count));
  for (int64_t k = 0; k < count; ++k) {
    const T* roi = rois + 5 * k;
    const int64_t image = roi_image(roi[0], batch);
    STD_TORCH_CHECK(image >= 0, "rois[", k, "] must have a batch index in [0, ", batch, "), got ", roi[0]);
    const int32_t level = levels.size() == 1 ? 0 : roi_level(roi[1], roi[2], roi[3], roi[4], pooling.rule);
    const double scale = pooling.scales[level];
    places.push_back({level, pixel_of(roi[2], roi[4], scale, levels[level].height) / kBand, pixel_of(roi[1], roi[3], scale, levels[level].width), image, k});
  }
  std::sort(places.begin(), places.end());
  return places;
}

// The plans of all RoIs, in order.
struct Plans {
  std::vector<Place> places;
  std::vector<RoiWork> works;
  std::vector<RoiArena> arenas;
};

// `place(work, place, level)` fills in pointers and strides.
template <class T, class F>
Plans planned(const Tensor& rois, int64_t batch, const Pooling& p, const std::vector<Level>& levels, bool gradient, const F& place) {
  const T* data = static_cast<const T*>(rois.const_data_ptr());
  const int64_t count = rois.size(0), chunks = (count + kPlanRois - 1) / kPlanRois;
  const int32_t lanes = NASDET_KERNEL(roi_align_bytes)() / int32_t(sizeof(T));
  Plans plans{ordered(data, count, batch, p, levels), std::vector<RoiWork>(size_t(count)), std::vector<RoiArena>(size_t(chunks))};
  for_ranges(chunks, threads(), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      RoiPlanner<T> planner(plans.arenas[chunk]);
      for (int64_t i = chunk * kPlanRois; i < std::min(count, (chunk + 1) * kPlanRois); ++i) {
        const Place& at = plans.places[i];
        const Level& level = levels[at.level];
        const T* roi = data + 5 * at.row;
        const T scale = T(p.scales[at.level]);
        RoiWork& work = plans.works[i];
        work.y = planner.pooling(roi_axis(roi[2], roi[4], scale, int32_t(p.height), int32_t(p.sampling_ratio), p.aligned), int32_t(p.height), int32_t(level.height));
        work.x = planner.pooling(roi_axis(roi[1], roi[3], scale, int32_t(p.width), int32_t(p.sampling_ratio), p.aligned), int32_t(p.width), int32_t(level.width));
        if (gradient) {
          work.y = planner.gradient(work.y);
          work.x = planner.gradient(work.x);
        }
        if (!level.channels_last) work.lanes = planner.lanes(work.x, lanes);
        place(work, at, level);
      }
    }
  });
  return plans;
}

const char* element(const Tensor& t, int64_t offset) {
  return static_cast<const char*>(t.const_data_ptr()) + offset * int64_t(t.element_size());
}

// RoIs [begin, end) of the order and channels [first, last).
struct Task { int64_t begin, end, first, last; bool channels_last; };

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
  std::vector<std::vector<T>> scratch(static_cast<size_t>(workers), std::vector<T>(size_t(kPlaneChannels * p.bins() + 32)));
  for_tasks(int64_t(tasks.size()), workers, [&](int64_t worker, int64_t t) {
    const Task& task = tasks[size_t(t)];
    const RoiJob job{out.mutable_data_ptr(), scratch[size_t(worker)].data(), task.first, task.last, 0, p.bins(), storage, false, streaming && (!task.channels_last || pixels_aligned)};
    (task.channels_last ? pixels : planes)(job, &plans.works[task.begin], task.end - task.begin);
  });
}

void check_features(const std::vector<Tensor>& features) {
  for (const Tensor& x : features) {
    STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && x.scalar_type() == features[0].scalar_type(), "features must be 4-dimensional maps of one dtype on the CPU");
    STD_TORCH_CHECK(x.size(0) == features[0].size(0) && x.size(1) == features[0].size(1), "features must have one batch size and one number of channels");
    STD_TORCH_CHECK(x.size(2) < (1 << 30) && x.size(3) < (1 << 30), "features must have less than 2^30 rows and columns");
  }
}

Tensor multilevel_roi_align(std::vector<Tensor> features, Tensor rois, std::vector<double> scales, int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio, bool aligned,
                            int64_t policy, double canonical_scale, int64_t canonical_level) {
  const Pooling pooling = checked_pooling(std::move(scales), int64_t(features.size()), pooled_height, pooled_width, sampling_ratio, aligned, policy, canonical_scale, canonical_level);
  check_features(features);
  storage_code(features[0], "features");
  check_rois(rois, features[0]);
  std::vector<Level> levels;
  for (const Tensor& x : features) {
    const bool nhwc = is_channels_last(x);
    levels.push_back({nhwc || x.is_contiguous() ? x : torch::stable::contiguous(x), x.size(2), x.size(3), nhwc});
  }
  const bool channels_last = levels[0].channels_last;
  Tensor out = empty_result({rois.size(0), features[0].size(1), pooled_height, pooled_width}, features[0], channels_last);
  const Tensor dense = torch::stable::contiguous(rois);
  if (features[0].scalar_type() == ScalarType::Double) pool<double>(levels, dense, pooling, out, channels_last);
  else pool<float>(levels, dense, pooling, out, channels_last);
  return out;
}

// RoIs [begin, end) of the order, all on one map: image `image` of level `level`.
struct Group { int64_t begin, end, image; int32_t level; };

std::vector<Group> groups_of(const std::vector<Place>& places) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < int64_t(places.size()); ++i) {
    const Place& at = places[i];
    if (groups.empty() || groups.back().level != at.level || groups.back().image != at.image) groups.push_back({i, i, at.image, at.level});
    groups.back().end = i + 1;
  }
  return groups;
}

// What no RoI reaches is written once and read by nobody here: past the caches, whole lines at a time.
void clear_untouched(char* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t head = std::min(bytes, int64_t(-reinterpret_cast<uintptr_t>(from) % kLine)), lines = (bytes - head) / kLine;
  std::memset(from, 0, size_t(head));
  float* at = reinterpret_cast<float*>(from + head);
  for (const float* end = at + lines * (kLine / int64_t(sizeof(float))); at < end; at += baseline::kLanes<float>) baseline::store_streaming(at, baseline::vec<float>{});
  std::memset(at, 0, size_t(bytes - head - lines * kLine));
}

void clear(const std::vector<std::pair<char*, int64_t>>& pieces) {
  for_ranges(int64_t(pieces.size()), threads(), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) clear_untouched(pieces[i].first, pieces[i].second);
    baseline::streaming_fence();
  });
}

// What a task of the gradient owns: channels [first, last) of rows [top, bottom) of one image on one level.
struct GradientTask { const Group* group; int64_t first, last, top, bottom; };

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
    const int64_t plane = level.height * level.width, image = group.image * channels * plane, size = int64_t(level.map.element_size());
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
    (level.channels_last ? NASDET_KERNEL(roi_align_pixels) : NASDET_KERNEL(roi_align_planes))(job, &plans.works[group.begin], group.end - group.begin);
    if constexpr (sizeof(T) == 4)
      if (narrow) {
        if (level.channels_last) NASDET_KERNEL(roi_align_narrow)(storage, sums.data(), std::min(channels, kPixelChannels), map + first * size, channels, plane, last - first);
        else NASDET_KERNEL(roi_align_narrow)(storage, sums.data(), 0, map + first * plane * size, 0, 1, (last - first) * plane);
      }
  }

  // Which pieces of a task's rows RoIs reach, each so many pixels.
  struct Reach {
    int64_t pixels, pieces;
    std::vector<bool> rows;
  };

  Reach reach(const GradientTask& task, const Level& level) const {
    const int64_t pixels = std::max<int64_t>(1, kReachBytes / std::max<int64_t>(1, channels * int64_t(sizeof(T)))), pieces = (level.width + pixels - 1) / pixels;
    Reach found{pixels, pieces, std::vector<bool>(size_t((task.bottom - task.top) * pieces))};
    for (int64_t i = task.group->begin; i < task.group->end; ++i) {
      const RoiSums &y = plans.works[i].y, &x = plans.works[i].x;
      if (x.count == 0) continue;
      const int64_t left = x.out[0] / pixels, right = x.out[x.count - 1] / pixels;
      for (const int32_t* row = std::lower_bound(y.out, y.out + y.count, int32_t(task.top)); row < y.out + y.count && *row < task.bottom; ++row)
        std::fill_n(found.rows.begin() + (*row - task.top) * pieces + left, right - left + 1, true);
    }
    return found;
  }

  static void clear_row(const Reach& reach, int64_t row, char* at, int64_t bytes, int64_t pixel_bytes) {
    const auto first = reach.rows.begin() + row * reach.pieces, last = first + reach.pieces;
    for (auto from = first; from < last;) {
      const auto to = std::find(from, last, !*from);
      const int64_t begin = (from - first) * reach.pixels * pixel_bytes, end = std::min(bytes, (to - first) * reach.pixels * pixel_bytes);
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
      for (; cleared < row; ++cleared) clear_row(reached, cleared - task.top, map + cleared * row_bytes, row_bytes, channels * int64_t(sizeof(T)));
    };
    for (int64_t i = task.group->begin; i < task.group->end; ++i) {
      RoiWork work = plans.works[i];
      const int32_t *begin = work.y.out, *end = begin + work.y.count;
      const int32_t *first = std::lower_bound(begin, end, int32_t(task.top)), *last = std::lower_bound(first, end, int32_t(task.bottom));
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
std::vector<GradientTask> gradient_tasks(const std::vector<Group>& groups, const std::vector<Level>& levels, int64_t channels, bool narrow) {
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
void add_up(const Tensor& grad_pixels, const Tensor& grad_planes, const Tensor& rois, int64_t batch, const Pooling& p, const std::vector<Level>& levels) {
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
      const bool used = std::any_of(groups.begin(), groups.end(), [&](const Group& g) { return g.level == l && g.image == image; });
      if (used) continue;  // its tasks write all of it
      const int64_t bytes = channels * levels[l].height * levels[l].width * int64_t(levels[l].map.element_size());
      char* map = static_cast<char*>(levels[l].map.mutable_data_ptr()) + image * bytes;
      for (int64_t at = 0; at < bytes; at += kClearBytes) pieces.push_back({map + at, std::min(kClearBytes, bytes - at)});
    }
  clear(pieces);
  const MapGradient<T> gradient{plans, levels, channels, p.bins(), storage_code(levels[0].map, "grad"), narrow};
  const std::vector<GradientTask> tasks = gradient_tasks(groups, levels, channels, narrow);
  const int64_t workers = threads();
  std::vector<std::vector<T>> sums(static_cast<size_t>(workers));
  for_tasks(int64_t(tasks.size()), workers, [&](int64_t worker, int64_t t) { gradient(tasks[size_t(t)], sums[size_t(worker)]); });
}

std::vector<Tensor> multilevel_roi_align_backward(Tensor grad, Tensor rois, int64_t batch, std::vector<int64_t> heights, std::vector<int64_t> widths, int64_t channels_last_mask,
                                                  std::vector<double> scales, int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio, bool aligned, int64_t policy,
                                                  double canonical_scale, int64_t canonical_level, bool /*deterministic: always*/) {
  const Pooling pooling = checked_pooling(std::move(scales), int64_t(heights.size()), pooled_height, pooled_width, sampling_ratio, aligned, policy, canonical_scale, canonical_level);
  check_rois(rois, grad);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.is_cpu() && grad.size(0) == rois.size(0) && grad.size(2) == pooled_height && grad.size(3) == pooled_width,
                  "grad must have shape (", rois.size(0), ", C, ", pooled_height, ", ", pooled_width, ") on the CPU");
  STD_TORCH_CHECK(widths.size() == heights.size() && heights.size() < 64, "heights and widths must have one entry per level");
  std::vector<Level> levels;
  std::vector<Tensor> gradients;
  bool any_pixels = false, any_planes = false;
  for (size_t l = 0; l < heights.size(); ++l) {
    STD_TORCH_CHECK(heights[l] >= 0 && widths[l] >= 0 && heights[l] < (1 << 30) && widths[l] < (1 << 30), "heights and widths must be in [0, 2^30)");
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
