// The launchers of nms and nms_padded: the order of the boxes, blocks of candidates, and the tasks of the threads.
#pragma once
#include <cstdlib>
#include <tuple>

#include "nms_order.h"

namespace nasdet {
namespace {

constexpr int64_t kTableCount = 1024;  // candidates of a class from which the table of kept boxes pays
constexpr int64_t kLeastBlock =
    2048;  // candidates that are compared with earlier blocks' boxes together, on several threads
constexpr int64_t kMostBlocks = 16;  // each waits for all threads once
constexpr int64_t kParallelCount = 8192;
constexpr int64_t kMostWords = 8;  // of a vector of any instruction set

struct Survivors {
  Buffer<uint32_t> indices;  // [count] boxes by rank
  Buffer<uint8_t> keep;      // [count] by rank
};

// Memory of one thread, reused from class to class.
template <class T> struct Scratch {
  int64_t room = 0;
  Buffer<T> kept;
  std::unique_ptr<uint64_t, decltype(&std::free)> table{nullptr, &std::free};

  void attach(NmsSegment<T>& s) {
    const int64_t boxes = (s.count + kGroupBoxes - 1) / kGroupBoxes * kGroupBoxes;
    if (boxes > room) {
      room = boxes;
      kept = Buffer<T>(5 * room);
    }
    for (int i = 0; i < 5; ++i) s.kept[i] = kept.get() + i * room;
    if (s.count < kTableCount || s.threshold < 0) return;
    s.stride = (boxes / kGroupBoxes + kMostWords - 1) / kMostWords * kMostWords;
    table.reset(static_cast<uint64_t*>(std::calloc(size_t(8 * kBins * s.stride), sizeof(uint64_t))));
    s.table = table.get();  // without the memory for it the boxes are compared one by one
    if (s.table) NASDET_KERNEL(nms_prepare)(sizeof(T) == 8, &s);
  }
};

template <class T>
NmsSegment<T> segment_of(const T* planes, int64_t total, int64_t begin, int64_t end, double threshold, int64_t limit,
                         uint8_t* keep) {
  NmsSegment<T> s{};
  for (int d = 0; d < 4; ++d) s.boxes[d] = planes + d * total + begin;
  s.count = end - begin;
  s.threshold = threshold;
  s.limit = limit;
  s.keep = keep + begin;
  return s;
}

template <class T> void resolve_segment(NmsSegment<T>& s, Scratch<T>& scratch) {
  if (s.count == 1 && s.limit > 0) return;
  scratch.attach(s);
  NASDET_KERNEL(nms_resolve)(sizeof(T) == 8, &s, 0, 0, s.count);
}

// The same on all threads: each block is first compared with what the blocks before it kept.
template <class T> void resolve_in_blocks(NmsSegment<T>& s, Scratch<T>& scratch) {
  constexpr bool wide = sizeof(T) == 8;
  scratch.attach(s);
  const int64_t block = std::max(kLeastBlock, s.count / kMostBlocks + 1);
  for (int64_t begin = 0; begin < s.count && s.taken < s.limit; begin += block) {
    const int64_t end = std::min(begin + block, s.count), words = s.table ? s.listed / kGroupBoxes : 0;
    if (words) {
      const auto kernel = NASDET_KERNEL(nms_filter);
      torch::stable::parallel_for(begin, end, 128,
                                  [&](int64_t first, int64_t last) { kernel(wide, &s, words, first, last); });
    }
    NASDET_KERNEL(nms_resolve)(wide, &s, words, begin, end);
    if (s.taken == s.limit) std::fill(s.keep + end, s.keep + s.count, uint8_t(0));
  }
}

template <class T>
void resolve_all(const T* planes, int64_t count, const std::vector<int64_t>& starts, double threshold, int64_t limit,
                 uint8_t* keep) {
  const int64_t segments = int64_t(starts.size()) - 1;
  const bool threads = count >= kParallelCount && torch::stable::get_num_threads() > 1;
  const auto blockwise = [&](int64_t i) { return threads && starts[i + 1] - starts[i] >= kParallelCount; };
  const auto segment = [&](int64_t i) {
    return segment_of(planes, count, starts[i], starts[i + 1], threshold, limit, keep);
  };
  const auto run = [&](int64_t first, int64_t last) {
    Scratch<T> scratch;
    for (int64_t i = first; i < last; ++i) {
      if (blockwise(i)) continue;
      NmsSegment<T> s = segment(i);
      resolve_segment(s, scratch);
    }
  };
  if (threads && segments > 1) torch::stable::parallel_for(0, segments, std::max<int64_t>(1, segments / 64), run);
  else run(0, segments);
  for (int64_t i = 0; i < segments; ++i) {
    if (!blockwise(i)) continue;
    Scratch<T> scratch;
    NmsSegment<T> s = segment(i);
    resolve_in_blocks(s, scratch);
  }
}

Survivors suppress(const BoxList& list, double threshold, int64_t limit) {
  const int64_t n = list.count;
  Survivors survivors{Buffer<uint32_t>(n), Buffer<uint8_t>(n)};
  if (n == 0) return survivors;
  with_storage(list.storage, [&](auto stored) {
    using S = decltype(stored);
    using T = NASDET_ISA::arithmetic_t<S>;
    rank_by_score<S>(list, survivors.indices.get());
    Groups groups;
    if (list.classes) groups = group_by_class(list, survivors.indices.get());
    else groups.starts = {0, n};
    const uint32_t* ranks = groups.ranks.get();
    Buffer<T> planes(4 * n);
    gather_boxes<S>(list, survivors.indices.get(), ranks, planes.get());
    Buffer<uint8_t> by_class(ranks ? n : 0);
    uint8_t* keep = ranks ? by_class.get() : survivors.keep.get();
    std::fill(keep, keep + n, uint8_t(1));
    resolve_all(planes.get(), n, groups.starts, threshold, limit, keep);
    for (int64_t i = 0; ranks && i < n; ++i) survivors.keep[ranks[i]] = keep[i];
  });
  return survivors;
}

Tensor nms(Tensor boxes, Tensor scores, std::optional<Tensor> classes, double iou_threshold) {
  check_cpu_boxes(boxes, scores, classes, iou_threshold, 0);
  const int64_t n = boxes.size(0);
  const Survivors survivors = suppress(list_of(boxes, scores, classes), iou_threshold, n);
  const int64_t kept = n - std::count(survivors.keep.get(), survivors.keep.get() + n, uint8_t(0));
  Tensor out = torch::stable::new_empty(boxes, {kept}, ScalarType::Long);
  int64_t* next = static_cast<int64_t*>(out.mutable_data_ptr());
  for (int64_t r = 0; r < n; ++r)
    if (survivors.keep[r]) *next++ = survivors.indices[r];
  return out;
}

std::tuple<Tensor, Tensor> nms_padded(Tensor boxes, Tensor scores, std::optional<Tensor> classes, double iou_threshold,
                                      int64_t max_out) {
  check_cpu_boxes(boxes, scores, classes, iou_threshold, 1);
  STD_TORCH_CHECK(max_out >= 0, "max_out must be at least 0, got ", max_out);
  const int64_t images = boxes.size(0);
  Tensor out = torch::stable::new_empty(boxes, {images, max_out}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(boxes, {images}, ScalarType::Long);
  int64_t* index = static_cast<int64_t*>(out.mutable_data_ptr());
  int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  const BoxList all = list_of(boxes, scores, classes);
  const int64_t size = boxes.element_size();
  const int64_t box_step = boxes.stride(0) * size;
  const int64_t score_step = scores.stride(0) * size;
  const int64_t class_step = classes ? classes->stride(0) : 0;
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      BoxList list = all;
      list.boxes = static_cast<const char*>(all.boxes) + b * box_step;
      list.scores = static_cast<const char*>(all.scores) + b * score_step;
      if (all.classes) list.classes = all.classes + b * class_step;
      const Survivors survivors = suppress(list, iou_threshold, max_out);
      int64_t* row = index + b * max_out;
      int64_t kept = 0;
      for (int64_t r = 0; r < list.count && kept < max_out; ++r)
        if (survivors.keep[r]) row[kept++] = survivors.indices[r];
      count[b] = kept;
      std::fill(row + kept, row + max_out, int64_t(-1));
    }
  };
  if (images > 1 && images * all.count >= kParallelCount) torch::stable::parallel_for(0, images, 1, run);
  else run(0, images);  // the threads, if any, then work inside the image
  return {out, counts};
}

}  // namespace
}  // namespace nasdet
