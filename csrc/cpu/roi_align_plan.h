// What a RoI reads and writes, found once per RoI and used for all of its channels. Pooling and its gradient are the same
// sum, out[y, x] = sum_s wy[y, s] sum_t wx[x, t] in[s, t]: pooling makes bins from pixels, the gradient pixels from bins.
#pragma once
#include <cstdint>

namespace nasdet {

// The sums of one axis: out position `out[i]` takes in positions `in[j]` with `weight[j]`, first[i] <= j < first[i + 1].
struct RoiSums {
  const int32_t* out;
  const int32_t* first;
  const int32_t* in;
  const void* weight;  // float, or double when the features are double
  int32_t count;
  int32_t in_end;  // all in positions are below
};

// The sums along x for planes, W neighbouring out positions in the lanes of one vector: each window loads W (or 2W, if
// wide) in positions, and each of its steps moves to every lane one of them, times a weight.
struct RoiWindow {
  int32_t in, first, last;  // steps
  bool wide;
};
struct RoiLanes {
  struct Group {
    int32_t out, first, last;  // windows
  };
  const Group* groups;
  const RoiWindow* windows;
  const void* pick;  // [steps][W] integers as wide as the arithmetic: in position - RoiWindow::in
  const void* keep;  // [steps][W] the same type: all ones, or 0 where the step gives nothing to a lane
  const void* weight;
  int32_t count;
  int32_t in_end;  // no window reads this position or a later one
  bool shared;     // all windows are one, narrow and from position 0
};

struct RoiWork {
  const void* in;                                                           // channel 0
  const void* in_end;                                                       // nothing can be read from here on
  int64_t out;                                                              // offset from RoiJob::out
  int64_t in_row, in_column, in_channel, out_row, out_column, out_channel;  // strides
  int64_t out_end;                                                          // gradients of planes: elements of a plane
  RoiSums y, x;
  RoiLanes lanes;  // planes only
};

// Channels [first, last) of some RoIs; channel c of RoiWork::in goes to channel c - out_first of RoiJob::out.
struct RoiJob {
  void* out;
  void* scratch;  // pooling planes: [last - first, bins] and 2 vectors, in the type of the arithmetic
  int64_t first, last, out_first;
  int64_t bins;
  int storage;  // storage_code() of what is read; gradients are accumulated in the type of the arithmetic
  bool gradient;
  bool streaming;  // results are larger than the caches: bypass them
};

}  // namespace nasdet

#ifdef NASDET_REGISTER
#include <algorithm>
#include <memory>
#include <vector>

#include "nasdet/roi.h"

namespace nasdet {

// Memory of plans: pointers stay where they are, everything is freed at once.
class RoiArena {
 public:
  template <class E> E* take(size_t count) {
    const size_t bytes = (count * sizeof(E) + 63) / 64 * 64;
    if (bytes > left_) {
      left_ = std::max<size_t>(bytes, 1 << 16);
      blocks_.emplace_back(new char[left_ + 64]);
      next_ = blocks_.back().get() + (64 - reinterpret_cast<uintptr_t>(blocks_.back().get()) % 64) % 64;
    }
    E* taken = reinterpret_cast<E*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return taken;
  }
  template <class E> const E* keep(const std::vector<E>& values) {
    return std::copy(values.begin(), values.end(), take<E>(values.size())) - values.size();
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

template <class T> struct RoiIndex { using type = int32_t; };
template <> struct RoiIndex<double> { using type = int64_t; };

// Makes the plans of RoIs, one after another.
template <class T> class RoiPlanner {
 public:
  explicit RoiPlanner(RoiArena& arena) : arena_(arena) {}

  // Bins from pixels: the distinct pixels of each bin's samples, with the samples' weights over their number.
  RoiSums pooling(const RoiAxis<T>& axis, int32_t pooled, int32_t size) {
    clear();
    for (int32_t bin = 0; bin < pooled; ++bin) {
      begin(bin);
      int32_t sample, last;
      roi_samples(axis, bin, size, &sample, &last);
      for (; sample < last; ++sample) {
        const RoiTaps<T> taps = roi_taps(roi_position(axis, bin, sample), size);
        if (!taps.inside) continue;
        add(taps.low, taps.low_weight / T(axis.grid));
        if (taps.high != taps.low) add(taps.high, taps.high_weight / T(axis.grid));
      }
    }
    return kept();
  }

  // The same sums turned round: pixels from bins.
  RoiSums gradient(const RoiSums& sums) {
    entries_.clear();
    for (int32_t i = 0; i < sums.count; ++i)
      for (int32_t j = sums.first[i]; j < sums.first[i + 1]; ++j)
        entries_.push_back({sums.in[j], sums.out[i], static_cast<const T*>(sums.weight)[j]});
    std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
      return a.pixel < b.pixel || (a.pixel == b.pixel && a.bin < b.bin);
    });
    clear();
    for (const Entry& e : entries_) {
      if (out_.empty() || out_.back() != e.pixel) begin(e.pixel);
      in_.push_back(e.bin);
      weight_.push_back(e.weight);
    }
    return kept();
  }

  // `sums` for vectors of `width` lanes; out positions that `sums` skips get zeros.
  RoiLanes lanes(const RoiSums& sums, int32_t width) {
    const bool shared = sums.in_end <= width;
    groups_.clear();
    windows_.clear();
    pick_.clear();
    keep_.clear();
    lane_weight_.clear();
    int32_t in_end = 0;
    for (int32_t i = 0; i < sums.count;) {
      int32_t end = i;
      entries_.clear();  // pixel: in position, bin: lane
      for (; end < sums.count && sums.out[end] - sums.out[i] < width; ++end)
        for (int32_t j = sums.first[end]; j < sums.first[end + 1]; ++j)
          entries_.push_back({sums.in[j], sums.out[end] - sums.out[i], static_cast<const T*>(sums.weight)[j]});
      std::stable_sort(entries_.begin(), entries_.end(),
                       [](const Entry& a, const Entry& b) { return a.pixel < b.pixel; });
      const int32_t first_window = int32_t(windows_.size());
      for (size_t e = 0; e < entries_.size();) e = window(e, width, shared, &in_end);
      groups_.push_back({sums.out[i], first_window, int32_t(windows_.size())});
      i = end;
    }
    return {arena_.keep(groups_),
            arena_.keep(windows_),
            arena_.keep(pick_),
            arena_.keep(keep_),
            arena_.keep(lane_weight_),
            int32_t(groups_.size()),
            in_end,
            shared};
  }

 private:
  struct Entry {
    int32_t pixel, bin;
    T weight;
  };

  void clear() {
    out_.clear();
    first_.clear();
    in_.clear();
    weight_.clear();
  }
  void begin(int32_t out) {
    out_.push_back(out);
    first_.push_back(int32_t(in_.size()));
  }
  void add(int32_t pixel, T weight) {  // samples move one way, so a pixel returns among the last two or never
    const size_t n = in_.size(), own = n - size_t(first_.back());
    for (size_t back = 1; back <= 2 && back <= own; ++back)
      if (in_[n - back] == pixel) {
        weight_[n - back] += weight;
        return;
      }
    in_.push_back(pixel);
    weight_.push_back(weight);
  }
  RoiSums kept() {
    first_.push_back(int32_t(in_.size()));
    const int32_t in_end = in_.empty() ? 0 : *std::max_element(in_.begin(), in_.end()) + 1;
    return {arena_.keep(out_),    arena_.keep(first_),  arena_.keep(in_),
            arena_.keep(weight_), int32_t(out_.size()), in_end};
  }

  // The window that begins at entry `e`; returns the entry after it.
  size_t window(size_t e, int32_t width, bool shared, int32_t* in_end) {
    using Index = typename RoiIndex<T>::type;
    const int32_t start = shared ? 0 : entries_[e].pixel, first_step = int32_t(lane_weight_.size() / size_t(width));
    used_.assign(size_t(width), 0);
    int32_t steps = 0, furthest = start;
    for (; e < entries_.size() && entries_[e].pixel - start < 2 * width; ++e) {
      const int32_t lane = entries_[e].bin, step = used_[lane]++;
      if (step == steps) {
        ++steps;
        pick_.resize(pick_.size() + size_t(width), Index(0));
        keep_.resize(keep_.size() + size_t(width), Index(0));
        lane_weight_.resize(lane_weight_.size() + size_t(width), T(0));
      }
      const size_t at = size_t(first_step + step) * size_t(width) + size_t(lane);
      furthest = entries_[e].pixel;
      pick_[at] = furthest - start;
      keep_[at] = Index(-1);
      lane_weight_[at] = entries_[e].weight;
    }
    const bool wide = furthest - start >= width;
    windows_.push_back({start, first_step, first_step + steps, wide});
    *in_end = std::max(*in_end, start + (wide ? 2 : 1) * width);
    return e;
  }

  RoiArena& arena_;
  std::vector<int32_t> out_, first_, in_, used_;
  std::vector<T> weight_, lane_weight_;
  std::vector<Entry> entries_;
  std::vector<RoiLanes::Group> groups_;
  std::vector<RoiWindow> windows_;
  std::vector<typename RoiIndex<T>::type> pick_, keep_;
};

}  // namespace nasdet
#endif
