// Non-maximum suppression: candidates in the order of their scores, each against the boxes kept so far.
#include "nasdet/boxes.h"
#include "nasdet/isa.h"
#include "nms_lanes.h"

namespace nasdet {

constexpr int kBins = 32;        // of the table of kept boxes, per coordinate
constexpr int kGroupBoxes = 64;  // kept boxes of one word of the table

// The candidates of one class and the boxes kept of them. Boxes that can neither suppress nor be suppressed are kept without
// entering the lists.
template <class T> struct NmsSegment {
  const T* boxes[4];  // x1, y1, x2, y2 of the candidates, best first
  int64_t count;
  double threshold;
  int64_t limit;  // stop after so many
  uint8_t* keep;  // [count], 1 at the start; 0 = dropped
  int64_t taken;  // candidates kept
  T* kept[5];     // x1, y1, x2, y2 and share; [listed], and inert boxes up to a multiple of kGroupBoxes
  int64_t listed;
  uint64_t*
      table;  // [coordinate][from, to][bin][stride]: which kept boxes have the coordinate in bins >= from, <= to; or null
  int64_t stride;      // words of a row
  T low[4], scale[4];  // bin = (coordinate - low) * scale
};

}  // namespace nasdet

// `wide`: the segment is NmsSegment<double>, else NmsSegment<float>.
NASDET_DECLARE_KERNEL(void, nms_prepare, bool wide, void* segment)
NASDET_DECLARE_KERNEL(void, nms_filter, bool wide, const void* segment, int64_t words, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, nms_resolve, bool wide, void* segment, int64_t first_word, int64_t begin, int64_t end)

namespace nasdet::NASDET_ISA {
namespace {

template <class T> struct Limits;
template <> struct Limits<float> {
  static constexpr float kMax = 3.402823466e38f, kTiny = 7.9e-31f, kInf = __builtin_inff();
};
template <> struct Limits<double> {
  static constexpr double kMax = 1.7976931348623157e308, kTiny = 1e-270, kInf = __builtin_inf();
};

// Relative room for the roundings of either arithmetic, some 2^-21 in float32: the tests that skip pairs may err to one side only.
constexpr double kSlack = 1.0 / (1 << 18);
constexpr double kSmallThreshold = 1.0 / (1 << 20);  // below it products with the threshold could underflow

template <class T> NASDET_INLINE Box<T> candidate_box(const NmsSegment<T>& s, int64_t c) {
  return {s.boxes[0][c], s.boxes[1][c], s.boxes[2][c], s.boxes[3][c]};
}
template <class T> NASDET_INLINE Box<T> kept_box(const NmsSegment<T>& s, int64_t k) {
  return {s.kept[0][k], s.kept[1][k], s.kept[2][k], s.kept[3][k]};
}

// At a threshold >= 0: no overlap, or an IoU of 0 or NaN, with every other box.
template <class T> NASDET_INLINE bool inert(const Box<T>& box, T area) {
  return !(area > T(0) && area <= Limits<T>::kMax && box.x2 > box.x1);
}

// IoU > t needs width * height > share(a) + share(b) of the intersection, where share = t / (1 + t) * area: no division.
template <class T> NASDET_INLINE T share_factor(double threshold) {
  return threshold < kSmallThreshold ? T(0) : T(threshold / (1 + threshold) * (1 - kSlack));
}
template <class T> NASDET_INLINE T share_of(T area, T factor) { return area < Limits<T>::kTiny ? T(0) : area * factor; }

template <class T> struct Candidate {
  Box<T> box;
  T area, share;
  vec<T> x1, y1, x2, y2, shares;

  NASDET_INLINE Candidate(const Box<T>& b, T a, T s)
      : box(b),
        area(a),
        share(s),
        x1(splat(b.x1)),
        y1(splat(b.y1)),
        x2(splat(b.x2)),
        y2(splat(b.y2)),
        shares(splat(s)) {}
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

template <class T>
NASDET_INLINE bool hit_in_range(const NmsSegment<T>& s, const Candidate<T>& c, int64_t begin, int64_t end) {
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
template <class T>
NASDET_INLINE bool hit_in_words(const NmsSegment<T>& s, const Candidate<T>& c, int64_t first, int64_t last) {
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
    for (int k = 0; k < kGroupBoxes; ++k)
      in_bin[bin_of(s, coordinate, s.kept[coordinate][first + k])] |= uint64_t(1) << k;
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
    if (!inert(box, area) &&
        hit_in_words(s, Candidate<T>(box, area, share_of(area, share_factor<T>(s.threshold))), 0, words))
      s.keep[i] = 0;
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
#include "nms_launch.h"

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("nms", TORCH_BOX(&nasdet::nms));
  m.impl("nms_padded", TORCH_BOX(&nasdet::nms_padded));
}
#endif
