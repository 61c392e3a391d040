// Non-maximum suppression: candidates in the order of their scores, each against the boxes kept so far.
#include "nasdet/boxes.h"
#include "nasdet/isa.h"
#include "nms_lanes.h"

namespace nasdet {

constexpr int kBins = 32;         // of the table of kept boxes, per coordinate
constexpr int kGroupBoxes = 64;   // kept boxes of one word of the table

// The candidates of one class and the boxes kept of them. Boxes that can neither suppress nor be suppressed are kept without
// entering the lists.
template <class T> struct NmsSegment {
  const T* boxes[4];     // x1, y1, x2, y2 of the candidates, best first
  int64_t count;
  double threshold;
  int64_t limit;         // stop after so many
  uint8_t* keep;         // [count], 1 at the start; 0 = dropped
  int64_t taken;         // candidates kept
  T* kept[5];            // x1, y1, x2, y2 and share; [listed], and inert boxes up to a multiple of kGroupBoxes
  int64_t listed;
  uint64_t* table;       // [coordinate][from, to][bin][stride]: which kept boxes have the coordinate in bins >= from, <= to; or null
  int64_t stride;        // words of a row
  T low[4], scale[4];    // bin = (coordinate - low) * scale
};

}  // namespace nasdet

// `wide`: the segment is NmsSegment<double>, else NmsSegment<float>.
NASDET_DECLARE_KERNEL(void, nms_prepare, bool wide, void* segment)
NASDET_DECLARE_KERNEL(void, nms_filter, bool wide, const void* segment, int64_t words, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, nms_resolve, bool wide, void* segment, int64_t first_word, int64_t begin, int64_t end)

namespace nasdet::NASDET_ISA {
namespace {

template <class T> struct Limits;
template <> struct Limits<float> { static constexpr float kMax = 3.402823466e38f, kTiny = 7.9e-31f, kInf = __builtin_inff(); };
template <> struct Limits<double> { static constexpr double kMax = 1.7976931348623157e308, kTiny = 1e-270, kInf = __builtin_inf(); };

// Relative room for the roundings of either arithmetic, some 2^-21 in float32: the tests that skip pairs may err to one side only.
constexpr double kSlack = 1.0 / (1 << 18);
constexpr double kSmallThreshold = 1.0 / (1 << 20);  // below it products with the threshold could underflow

template <class T> NASDET_INLINE Box<T> candidate_box(const NmsSegment<T>& s, int64_t c) {
  return {s.boxes[0][c], s.boxes[1][c], s.boxes[2][c], s.boxes[3][c]};
}
template <class T> NASDET_INLINE Box<T> kept_box(const NmsSegment<T>& s, int64_t k) { return {s.kept[0][k], s.kept[1][k], s.kept[2][k], s.kept[3][k]}; }

// At a threshold >= 0: no overlap, or an IoU of 0 or NaN, with every other box.
template <class T> NASDET_INLINE bool inert(const Box<T>& box, T area) { return !(area > T(0) && area <= Limits<T>::kMax && box.x2 > box.x1); }

// IoU > t needs width * height > share(a) + share(b) of the intersection, where share = t / (1 + t) * area: no division.
template <class T> NASDET_INLINE T share_factor(double threshold) {
  return threshold < kSmallThreshold ? T(0) : T(threshold / (1 + threshold) * (1 - kSlack));
}
template <class T> NASDET_INLINE T share_of(T area, T factor) { return area < Limits<T>::kTiny ? T(0) : area * factor; }

template <class T> struct Candidate {
  Box<T> box;
  T area, share;
  vec<T> x1, y1, x2, y2, shares;

  NASDET_INLINE Candidate(const Box<T>& b, T a, T s) : box(b), area(a), share(s), x1(splat(b.x1)), y1(splat(b.y1)), x2(splat(b.x2)), y2(splat(b.y2)), shares(splat(s)) {}
};

// Whether one of the kLanes<T> kept boxes from k suppresses the candidate. Pairs that pass the test without division are decided
// by the exact rule.
template <class T> NASDET_INLINE bool hit(const NmsSegment<T>& s, const Candidate<T>& c, int64_t k) {
  const vec<T> width = lane_max(lane_min(c.x2, load(s.kept[2] + k)) - lane_max(c.x1, load(s.kept[0] + k)), vec<T>{});
  const vec<T> height = lane_min(c.y2, load(s.kept[3] + k)) - lane_max(c.y1, load(s.kept[1] + k));
  for (uint32_t bits = greater_bits(width * height - load(s.kept[4] + k), c.shares); bits; bits &= bits - 1) {
    const Box<T> other = kept_box(s, k + __builtin_ctz(bits));
    if (double(box_iou(other, box_area(other), c.box, c.area)) > s.threshold) return true;
  }
  return false;
}

template <class T> NASDET_INLINE bool hit_in_range(const NmsSegment<T>& s, const Candidate<T>& c, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; k += kLanes<T>)
    if (hit(s, c, k)) return true;
  return false;
}

template <class T> NASDET_INLINE int bin_of(const NmsSegment<T>& s, int coordinate, T value) {
  return int(smaller(larger(T(0), (value - s.low[coordinate]) * s.scale[coordinate]), T(kBins - 1)));
}
template <class T> NASDET_INLINE const uint64_t* row(const NmsSegment<T>& s, int coordinate, int side, int bin) {
  return s.table + ((coordinate * 2 + side) * kBins + bin) * s.stride;
}

// The rows whose conjunction holds every kept box that may have IoU > t with the candidate. The IoU of two boxes is at most that of
// their projections on an axis, and an interval of length w that reaches IoU > t begins at most w (1 / t - 1) before
// the other and w (1 - t) after it. Subtraction and rounding are monotone, so the bounds need no room for cancellation.
template <class T> struct Rows {
  const uint64_t* at[8];

  NASDET_INLINE Rows(const NmsSegment<T>& s, const Candidate<T>& c) {
    const double t = s.threshold < kSmallThreshold || c.area < Limits<T>::kTiny ? 0 : s.threshold * (1 - kSlack);
    const T outside = t > 0 ? T(1 / t - 1) : Limits<T>::kInf, inside = T((1 - t) * (1 + kSlack));
    const T ends[4] = {c.box.x1, c.box.y1, c.box.x2, c.box.y2};
    for (int i = 0; i < 4; ++i) {
      const T length = i % 2 ? c.box.y2 - c.box.y1 : c.box.x2 - c.box.x1;
      const T before = length * (i < 2 ? outside : inside), after = length * (i < 2 ? inside : outside);
      at[2 * i] = row(s, i, 0, bin_of(s, i, ends[i] - before));
      at[2 * i + 1] = row(s, i, 1, bin_of(s, i, ends[i] + after));
    }
  }

  NASDET_INLINE vec_u64 both(int64_t word) const {
    vec_u64 all = load_words(at[0] + word);
    for (int i = 1; i < 8; ++i) all &= load_words(at[i] + word);
    return all;
  }
};

// Whether a kept box of the words [first, last) of the table suppresses the candidate.
template <class T> NASDET_INLINE bool hit_in_words(const NmsSegment<T>& s, const Candidate<T>& c, int64_t first, int64_t last) {
  if (first >= last) return false;
  const Rows<T> rows(s, c);
  for (int64_t word = first / kWords * kWords; word < last; word += kWords) {
    const vec_u64 found = rows.both(word);
    if (!any_bit(found)) continue;
    uint64_t words[kWords];
    __builtin_memcpy(words, &found, sizeof words);
    for (int i = 0; i < kWords; ++i) {
      while (words[i]) {
        const int lane = __builtin_ctzll(words[i]) / kLanes<T> * kLanes<T>;
        if (hit(s, c, (word + i) * kGroupBoxes + lane)) return true;
        words[i] &= lane + kLanes<T> == 64 ? 0 : ~uint64_t(0) << (lane + kLanes<T>);
      }
    }
  }
  return false;
}

// Enters the last kGroupBoxes kept boxes as one word of every row.
template <class T> void enter_group(NmsSegment<T>& s) {
  const int64_t word = s.listed / kGroupBoxes - 1, first = word * kGroupBoxes;
  for (int coordinate = 0; coordinate < 4; ++coordinate) {
    uint64_t in_bin[kBins] = {};
    for (int k = 0; k < kGroupBoxes; ++k) in_bin[bin_of(s, coordinate, s.kept[coordinate][first + k])] |= uint64_t(1) << k;
    uint64_t* rows = s.table + coordinate * 2 * kBins * s.stride + word;
    uint64_t below = 0, above = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      above |= in_bin[kBins - 1 - bin];
      below |= in_bin[bin];
      rows[(kBins - 1 - bin) * s.stride] = above;
      rows[(kBins + bin) * s.stride] = below;
    }
  }
}

template <class T> NASDET_INLINE void enter(NmsSegment<T>& s, const Candidate<T>& c) {
  const int64_t k = s.listed++;
  if (k % kGroupBoxes == 0) {  // the places behind are compared too, and must suppress nothing
    for (int i = 0; i < kGroupBoxes; ++i) {
      s.kept[0][k + i] = s.kept[1][k + i] = s.kept[4][k + i] = Limits<T>::kInf;
      s.kept[2][k + i] = s.kept[3][k + i] = -Limits<T>::kInf;
    }
  }
  s.kept[0][k] = c.box.x1;
  s.kept[1][k] = c.box.y1;
  s.kept[2][k] = c.box.x2;
  s.kept[3][k] = c.box.y2;
  s.kept[4][k] = c.share;
  if (s.table && s.listed % kGroupBoxes == 0) enter_group(s);
}

template <class T> void filter(NmsSegment<T> s, int64_t words, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Box<T> box = candidate_box(s, i);
    const T area = box_area(box);
    if (!inert(box, area) && hit_in_words(s, Candidate<T>(box, area, share_of(area, share_factor<T>(s.threshold))), 0, words)) s.keep[i] = 0;
  }
}

template <class T> void resolve(NmsSegment<T>& s, int64_t first_word, int64_t begin, int64_t end) {
  const T factor = share_factor<T>(s.threshold);
  for (int64_t i = begin; i < end; ++i) {
    if (s.taken == s.limit) s.keep[i] = 0;
    if (!s.keep[i]) continue;
    const Box<T> box = candidate_box(s, i);
    const T area = box_area(box);
    if (!inert(box, area)) {
      const Candidate<T> c(box, area, share_of(area, factor));
      const int64_t words = s.table ? s.listed / kGroupBoxes : first_word;
      if (hit_in_words(s, c, first_word, words) || hit_in_range(s, c, words * kGroupBoxes, s.listed)) {
        s.keep[i] = 0;
        continue;
      }
      enter(s, c);
    }
    ++s.taken;
  }
}

// A negative threshold: boxes without overlap suppress each other too, unless their IoU is NaN.
template <class T> void resolve_all_pairs(NmsSegment<T>& s, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Box<T> box = candidate_box(s, i);
    const T area = box_area(box);
    bool dropped = s.taken == s.limit;
    for (int64_t k = 0; k < s.listed && !dropped; ++k) {
      const Box<T> other = kept_box(s, k);
      dropped = double(box_iou(other, box_area(other), box, area)) > s.threshold;
    }
    s.keep[i] = !dropped;
    if (dropped) continue;
    enter(s, Candidate<T>(box, area, T(0)));
    ++s.taken;
  }
}

// The range of the bins: what the bulk of up to 64 candidates spans, since a few far boxes must not make all bins one.
template <class T> void prepare(NmsSegment<T>& s) {
  for (int coordinate = 0; coordinate < 4; ++coordinate) {
    T sorted[64];
    int count = 0;
    const int64_t step = s.count / 64 + 1;
    for (int64_t i = 0; i < s.count; i += step) {
      const T value = s.boxes[coordinate][i];
      if (!(value >= -Limits<T>::kMax && value <= Limits<T>::kMax)) continue;
      int place = count++;
      for (; place > 0 && sorted[place - 1] > value; --place) sorted[place] = sorted[place - 1];
      sorted[place] = value;
    }
    const T low = count ? sorted[count / 32] : T(0), high = count ? sorted[count - 1 - count / 32] : T(0);
    s.low[coordinate] = low;
    s.scale[coordinate] = high > low ? T(kBins) / (high - low) : T(0);
  }
}

}  // namespace

void nms_prepare(bool wide, void* segment) {
  wide ? prepare(*static_cast<NmsSegment<double>*>(segment)) : prepare(*static_cast<NmsSegment<float>*>(segment));
}

void nms_filter(bool wide, const void* segment, int64_t words, int64_t begin, int64_t end) {
  wide ? filter(*static_cast<const NmsSegment<double>*>(segment), words, begin, end)
       : filter(*static_cast<const NmsSegment<float>*>(segment), words, begin, end);
}

template <class T> static void resolve_as(NmsSegment<T>& s, int64_t first_word, int64_t begin, int64_t end) {
  s.threshold < 0 ? resolve_all_pairs(s, begin, end) : resolve(s, first_word, begin, end);
}

void nms_resolve(bool wide, void* segment, int64_t first_word, int64_t begin, int64_t end) {
  wide ? resolve_as(*static_cast<NmsSegment<double>*>(segment), first_word, begin, end)
       : resolve_as(*static_cast<NmsSegment<float>*>(segment), first_word, begin, end);
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include <cstdlib>
#include <tuple>

#include "nms_order.h"

namespace nasdet {
namespace {

constexpr int64_t kTableCount = 1024;   // candidates of a class from which the table of kept boxes pays
constexpr int64_t kLeastBlock = 2048;   // candidates that are compared with earlier blocks' boxes together, on several threads
constexpr int64_t kMostBlocks = 16;     // each waits for all threads once
constexpr int64_t kParallelCount = 8192;
constexpr int64_t kMostWords = 8;       // of a vector of any instruction set

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

template <class T> NmsSegment<T> segment_of(const T* planes, int64_t total, int64_t begin, int64_t end, double threshold, int64_t limit, uint8_t* keep) {
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
      torch::stable::parallel_for(begin, end, 128, [&](int64_t first, int64_t last) { kernel(wide, &s, words, first, last); });
    }
    NASDET_KERNEL(nms_resolve)(wide, &s, words, begin, end);
    if (s.taken == s.limit) std::fill(s.keep + end, s.keep + s.count, uint8_t(0));
  }
}

template <class T> void resolve_all(const T* planes, int64_t count, const std::vector<int64_t>& starts, double threshold, int64_t limit, uint8_t* keep) {
  const int64_t segments = int64_t(starts.size()) - 1;
  const bool threads = count >= kParallelCount && torch::stable::get_num_threads() > 1;
  const auto blockwise = [&](int64_t i) { return threads && starts[i + 1] - starts[i] >= kParallelCount; };
  const auto segment = [&](int64_t i) { return segment_of(planes, count, starts[i], starts[i + 1], threshold, limit, keep); };
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

std::tuple<Tensor, Tensor> nms_padded(Tensor boxes, Tensor scores, std::optional<Tensor> classes, double iou_threshold, int64_t max_out) {
  check_cpu_boxes(boxes, scores, classes, iou_threshold, 1);
  STD_TORCH_CHECK(max_out >= 0, "max_out must be at least 0, got ", max_out);
  const int64_t images = boxes.size(0);
  Tensor out = torch::stable::new_empty(boxes, {images, max_out}, ScalarType::Long), counts = torch::stable::new_empty(boxes, {images}, ScalarType::Long);
  int64_t *index = static_cast<int64_t*>(out.mutable_data_ptr()), *count = static_cast<int64_t*>(counts.mutable_data_ptr());
  const BoxList all = list_of(boxes, scores, classes);
  const int64_t size = boxes.element_size(), box_step = boxes.stride(0) * size, score_step = scores.stride(0) * size, class_step = classes ? classes->stride(0) : 0;
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

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("nms", TORCH_BOX(&nasdet::nms));
  m.impl("nms_padded", TORCH_BOX(&nasdet::nms_padded));
}
#endif
