// RoIAlign and its gradient on NCHW maps: rows of a channel's plane lie in the lanes of vectors. First the rows that an out
// row needs are summed, then lanes move to their out positions: the steps of a plan, the same for all channels.
#pragma once
#include "nasdet/simd.h"
#include "roi_align_plan.h"

namespace nasdet::NASDET_ISA {
namespace {

template <class T> struct Lanes;  // integers as wide as T
template <> struct Lanes<float> { typedef int32_t type __attribute__((vector_size(kBytes))); };
template <> struct Lanes<double> { typedef int64_t type __attribute__((vector_size(kBytes))); };
template <class T> using lanes_t = typename Lanes<T>::type;

// Lane i is element pick[i] of a (and b behind it), or 0 where keep is 0: a lane of weight 0 must not bring in a NaN.
template <class T> NASDET_INLINE vec<T> picked(vec<T> a, const lanes_t<T>& pick, const lanes_t<T>& keep) {
  return (vec<T>)((lanes_t<T>)__builtin_shuffle(a, pick) & keep);
}
template <class T> NASDET_INLINE vec<T> picked(vec<T> a, vec<T> b, const lanes_t<T>& pick, const lanes_t<T>& keep) {
  return (vec<T>)((lanes_t<T>)__builtin_shuffle(a, b, pick) & keep);
}

template <class S> NASDET_INLINE vec<arithmetic_t<S>> load_until(const S* p, const S* end) {
  const int64_t count = end - p;
  if (count >= kWidth<S>) return load(p);
  return count > 0 ? load_part(p, count) : vec<arithmetic_t<S>>{};
}

// A row's pixels lie far from the next row's and from the next channel's: the prefetchers of the CPU do not find them.
constexpr int64_t kPlanesAhead = 2;  // channels

template <class S> NASDET_INLINE void prefetch(const S* p, int count) {
  const char *first = reinterpret_cast<const char*>(p), *last = reinterpret_cast<const char*>(p + count) - 1;
  for (const char* line = first; line < last; line += 64) __builtin_prefetch(line);
  __builtin_prefetch(last);
}

template <class S> struct RoiRow {  // of one channel: the rows that out row `row` is made of
  const RoiWork& w;
  const S* in;
  int32_t first, last;
  RoiRow(const RoiWork& work, const S* plane, int row)
      : w(work), in(plane), first(w.y.first[row]), last(w.y.first[row + 1]) {}

  // kVectors vectors of their sum from column `column` on. kSafe: whole vectors can be read anywhere.
  template <bool kSafe, bool kAhead, int kVectors>
  NASDET_INLINE void sum(int32_t column, vec<arithmetic_t<S>>* sums) const {
    using T = arithmetic_t<S>;
    constexpr int W = kWidth<S>;
    const T* wy = static_cast<const T*>(w.y.weight);
    const S* end = static_cast<const S*>(w.in_end);
    vec<T> sum[kVectors] = {};
    for (int32_t i = first; i < last; ++i) {
      const S* p = in + w.y.in[i] * w.in_row + column;
      if (kAhead) prefetch(p + kPlanesAhead * w.in_channel, kVectors * W);
      for (int v = 0; v < kVectors; ++v)
        sum[v] += splat<T>(wy[i]) * (kSafe ? load(p + v * W) : load_until(p + v * W, end));
    }
    for (int v = 0; v < kVectors; ++v) sums[v] = sum[v];
  }
};

template <class T> struct RoiSteps {
  const lanes_t<T>* pick;
  const lanes_t<T>* keep;
  const vec<T>* weight;
  explicit RoiSteps(const RoiLanes& l)
      : pick(static_cast<const lanes_t<T>*>(l.pick)),
        keep(static_cast<const lanes_t<T>*>(l.keep)),
        weight(static_cast<const vec<T>*>(l.weight)) {}
  NASDET_INLINE vec<T> moved(const RoiWindow& window, vec<T> a) const {
    vec<T> sum = {};
    for (int32_t s = window.first; s < window.last; ++s) sum += picked<T>(a, pick[s], keep[s]) * weight[s];
    return sum;
  }
  NASDET_INLINE vec<T> moved(const RoiWindow& window, vec<T> a, vec<T> b) const {
    vec<T> sum = {};
    for (int32_t s = window.first; s < window.last; ++s) sum += picked<T>(a, b, pick[s], keep[s]) * weight[s];
    return sum;
  }
};

// Out columns group.out and following of an out row.
template <class S, bool kSafe, bool kAhead>
NASDET_INLINE vec<arithmetic_t<S>> roi_lanes(const RoiRow<S>& row, const RoiLanes::Group& group) {
  using T = arithmetic_t<S>;
  const RoiSteps<T> steps(row.w.lanes);
  vec<T> total = {};
  for (int32_t n = group.first; n < group.last; ++n) {
    const RoiWindow window = row.w.lanes.windows[n];
    vec<T> a[2];
    if (window.wide) {
      row.template sum<kSafe, kAhead, 2>(window.in, a);
      total += steps.moved(window, a[0], a[1]);
    } else {
      row.template sum<kSafe, kAhead, 1>(window.in, a);
      total += steps.moved(window, a[0]);
    }
  }
  return total;
}

template <class S, bool kSafe>
NASDET_INLINE void roi_plane_gradient(const RoiWork& w, const S* in, arithmetic_t<S>* out) {
  using T = arithmetic_t<S>;
  const T* end = out + w.out_end;
  const RoiSteps<T> steps(w.lanes);
  for (int32_t r = 0; r < w.y.count; ++r) {
    const RoiRow<S> row(w, in, r);
    vec<T> shared[1];
    if (w.lanes.shared) row.template sum<kSafe, false, 1>(0, shared);
    for (int32_t g = 0; g < w.lanes.count; ++g) {
      const RoiLanes::Group group = w.lanes.groups[g];
      T* p = out + w.y.out[r] * w.out_row + group.out;
      prefetch(p + kPlanesAhead * w.out_channel, kLanes<T>);
      const vec<T> sum = w.lanes.shared ? steps.moved(w.lanes.windows[group.first], shared[0])
                                        : roi_lanes<S, kSafe, false>(row, group);
      if (end - p >= kLanes<T>) store<T>(p, load<T>(p) + sum);
      else store_part<T>(p, load_part<T>(p, end - p) + sum, end - p);
    }
  }
}

// Into scratch [rows, out_row]: lanes beyond the last out column fall on what is written next, or behind the end.
template <class S, bool kSafe>
NASDET_INLINE void roi_plane_pooling(const RoiWork& w, const S* in, arithmetic_t<S>* out) {
  using T = arithmetic_t<S>;
  for (int32_t r = 0; r < w.y.count; ++r) {
    const RoiRow<S> row(w, in, r);
    for (int32_t g = 0; g < w.lanes.count; ++g)
      store<T>(out + r * int64_t(w.x.count) + w.lanes.groups[g].out, roi_lanes<S, kSafe, true>(row, w.lanes.groups[g]));
  }
}

// A block of consecutive results in their stored type.
template <class S> void roi_store_block(const arithmetic_t<S>* from, S* to, int64_t count, bool streaming) {
  constexpr int W = kWidth<S>;
  int64_t i = 0;
  if (streaming && reinterpret_cast<uintptr_t>(to) % kBytes == 0)
    for (; i + W <= count; i += W) store_streaming(to + i, load(from + i));
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

template <class S> void roi_pooled_block(const RoiJob& job, const RoiWork& w) {
  using T = arithmetic_t<S>;
  const T* scratch = static_cast<const T*>(job.scratch);
  S* out = static_cast<S*>(job.out) + w.out + (job.first - job.out_first) * w.out_channel;
  const int64_t channels = job.last - job.first;
  if (w.out_channel == job.bins) return roi_store_block<S>(scratch, out, channels * job.bins, job.streaming);
  for (int64_t bin = 0; bin < job.bins; ++bin)  // an NHWC result from NCHW maps
    for (int64_t c = 0; c < channels; c += kWidth<S>) {
      T lanes[kWidth<S>] = {};
      const int64_t count = channels - c < kWidth<S> ? channels - c : kWidth<S>;
      for (int64_t i = 0; i < count; ++i) lanes[i] = scratch[(c + i) * job.bins + bin];
      store_part(out + bin * w.out_column + c, load(lanes), count);
    }
}

template <class S, bool kGradient> void roi_planes(const RoiJob& job, const RoiWork* work, int64_t count) {
  using T = arithmetic_t<S>;
  for (int64_t n = 0; n < count; ++n) {
    const RoiWork w = work[n];  // a copy: stores through `out` could change the original
    const int64_t reach = (w.y.in_end - 1) * w.in_row + w.lanes.in_end;
    for (int64_t c = job.first; c < job.last; ++c) {
      const S* in = static_cast<const S*>(w.in) + c * w.in_channel;
      const bool safe = static_cast<const S*>(w.in_end) - in >= reach;
      if constexpr (kGradient) {
        if (n + 1 < count) prefetch(static_cast<const S*>(work[n + 1].in) + c * w.in_channel, int(job.bins));
        T* out = static_cast<T*>(job.out) + w.out + (c - job.out_first) * w.out_channel;
        safe ? roi_plane_gradient<S, true>(w, in, out) : roi_plane_gradient<S, false>(w, in, out);
      } else {
        T* out = static_cast<T*>(job.scratch) + (c - job.first) * job.bins;
        safe ? roi_plane_pooling<S, true>(w, in, out) : roi_plane_pooling<S, false>(w, in, out);
      }
    }
    if constexpr (!kGradient) roi_pooled_block<S>(job, w);
  }
  if (!kGradient && job.streaming) streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
