// What both directions of RoIAlign share: levels, the order of the RoIs and their plans.
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

constexpr int64_t kPlanRois = 64;                            // RoIs that one task plans
constexpr int64_t kPlaneChannels = 16, kPixelChannels = 64;  // channels of one task
constexpr int32_t kBand = 16;                                // RoIs are walked in bands of so many rows

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

template <class T>
std::vector<Place> ordered(const T* rois, int64_t count, int64_t batch, const Pooling& pooling,
                           const std::vector<Level>& levels) {
  std::vector<Place> places;
  places.reserve(size_t(count));
  for (int64_t k = 0; k < count; ++k) {
    const T* roi = rois + 5 * k;
    const int64_t image = roi_image(roi[0], batch);
    STD_TORCH_CHECK(image >= 0, "rois[", k, "] must have a batch index in [0, ", batch, "), got ", roi[0]);
    const int32_t level = levels.size() == 1 ? 0 : roi_level(roi[1], roi[2], roi[3], roi[4], pooling.rule);
    const double scale = pooling.scales[level];
    places.push_back({level, pixel_of(roi[2], roi[4], scale, levels[level].height) / kBand,
                      pixel_of(roi[1], roi[3], scale, levels[level].width), image, k});
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
Plans planned(const Tensor& rois, int64_t batch, const Pooling& p, const std::vector<Level>& levels, bool gradient,
              const F& place) {
  const T* data = static_cast<const T*>(rois.const_data_ptr());
  const int64_t count = rois.size(0), chunks = (count + kPlanRois - 1) / kPlanRois;
  const int32_t lanes = NASDET_KERNEL(roi_align_bytes)() / int32_t(sizeof(T));
  Plans plans{ordered(data, count, batch, p, levels), std::vector<RoiWork>(size_t(count)),
              std::vector<RoiArena>(size_t(chunks))};
  for_ranges(chunks, threads(), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      RoiPlanner<T> planner(plans.arenas[chunk]);
      for (int64_t i = chunk * kPlanRois; i < std::min(count, (chunk + 1) * kPlanRois); ++i) {
        const Place& at = plans.places[i];
        const Level& level = levels[at.level];
        const T* roi = data + 5 * at.row;
        const T scale = T(p.scales[at.level]);
        RoiWork& work = plans.works[i];
        work.y =
            planner.pooling(roi_axis(roi[2], roi[4], scale, int32_t(p.height), int32_t(p.sampling_ratio), p.aligned),
                            int32_t(p.height), int32_t(level.height));
        work.x =
            planner.pooling(roi_axis(roi[1], roi[3], scale, int32_t(p.width), int32_t(p.sampling_ratio), p.aligned),
                            int32_t(p.width), int32_t(level.width));
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

}  // namespace
}  // namespace nasdet
