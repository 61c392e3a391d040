// Soft suppression: the best box is selected, the scores of what overlaps it are lowered, and so on with the rest.
#include "nasdet/boxes.h"
#include "nasdet/isa.h"
#include "nms_lanes.h"

namespace nasdet {

enum : int { kLinear = 0, kGaussian = 1, kNaive = 2 };
constexpr int64_t kSoftRoom = 16;  // places behind the last candidate: lanes of the widest vector

// The candidates of one class. A NaN score marks a box that is out: selected, or below the least score.
template <class T> struct SoftSegment {
  T* boxes[4];  // [count + kSoftRoom] x1, y1, x2, y2
  T* areas;
  T* scores;
  uint32_t* indices;  // ascending, after the leading ones
  int64_t count;
  int64_t leading;  // boxes whose score was NaN from the start: they come first, in this order
  int method;
  double threshold, sigma, min_score;
  uint32_t* order;  // [count] results
  T* final_scores;
  int64_t selected;
};

}  // namespace nasdet

// `wide`: the segment is SoftSegment<double>, else SoftSegment<float>.
NASDET_DECLARE_KERNEL(void, soft_nms_select, bool wide, void* segment)

namespace nasdet::NASDET_ISA {
namespace {

template <class T> NASDET_INLINE T quiet_nan() { return T(__builtin_nan("")); }
NASDET_INLINE float exponential(float v) { return __builtin_expf(v); }
NASDET_INLINE double exponential(double v) { return __builtin_exp(v); }

// The largest value <= threshold: an IoU exceeds the one just when it exceeds the other.
NASDET_INLINE double rounded_down(double threshold, double) { return threshold; }
NASDET_INLINE float rounded_down(double threshold, float) {
  const float nearest = float(threshold);
  return double(nearest) > threshold ? __builtin_nextafterf(nearest, -__builtin_inff()) : nearest;
}

template <class T> NASDET_INLINE vec<T> rounded(vec<T> product) {
#if defined(__x86_64__)
  asm("" : "+x"(product));  // as in rounded_product
#else
  for (int i = 0; i < kLanes<T>; ++i) product[i] = rounded_product(T(product[i]), T(1));
#endif
  return product;
}

// The weight 1 - IoU (linear) or 0 (naive) where the IoU exceeds `bound`; a NaN IoU (boxes without area) does not.
template <class T> NASDET_INLINE void lower_lanes(SoftSegment<T>& s, vec<T> overlap, T area, T bound, int64_t i) {
  const vec<T> zero = {}, one = splat(T(1)), score = load(s.scores + i);
  const vec<T> iou = overlap / ((splat(area) + load(s.areas + i)) - overlap);
  const vec<T> weight = iou > splat(bound) ? (s.method == kLinear ? one - iou : zero) : one;
  const vec<T> lowered = (weight == zero) & (score == score) ? zero : score * weight;  // infinity times 0 is no score
  store(s.scores + i, lowered < splat(T(s.min_score)) ? splat(quiet_nan<T>()) : lowered);
}

// The weight exp(-IoU^2 / sigma) of one box.
template <class T> NASDET_INLINE void lower_gaussian(SoftSegment<T>& s, T overlap, T area, int64_t i) {
  const T iou = overlap / ((area + s.areas[i]) - overlap);
  if (iou != iou) return;
  const T weight = exponential(-(iou * iou) / T(s.sigma)), score = s.scores[i];
  const T lowered = weight == T(0) && score == score ? T(0) : score * weight;
  s.scores[i] = lowered < T(s.min_score) ? quiet_nan<T>() : lowered;
}

template <class T> NASDET_INLINE T horizontal_max(vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = larger(best, T(v[i]));
  return best;
}

// Lowers the scores of what overlaps `best`; returns the highest score that is left, -infinity when none is.
template <class T> NASDET_INLINE T lower_all(SoftSegment<T>& s, const Box<T>& best) {
  const bool every = s.method == kNaive && s.threshold < 0;  // then an IoU of 0 counts too
  const T area = box_area(best), bound = rounded_down(s.threshold, T{});
  const vec<T> x1 = splat(best.x1), y1 = splat(best.y1), x2 = splat(best.x2), y2 = splat(best.y2), zero = {};
  vec<T> highest = splat(T(-__builtin_inf()));
  for (int64_t i = 0; i < s.count; i += kLanes<T>) {
    const vec<T> width = lane_max(lane_min(x2, load(s.boxes[2] + i)) - lane_max(x1, load(s.boxes[0] + i)), zero);
    const vec<T> height = lane_max(lane_min(y2, load(s.boxes[3] + i)) - lane_max(y1, load(s.boxes[1] + i)), zero);
    const vec<T> overlap = rounded<T>(width * height);
    uint32_t bits = greater_bits(overlap, zero);
    if (s.method == kGaussian) {
      for (; bits; bits &= bits - 1) lower_gaussian(s, T(overlap[__builtin_ctz(bits)]), area, i + __builtin_ctz(bits));
    } else if (bits || every) {
      lower_lanes(s, overlap, area, bound, i);
    }
    highest = lane_max(load(s.scores + i), highest);  // the second where the first is NaN
  }
  return horizontal_max<T>(highest);
}

template <class T> NASDET_INLINE int64_t first_with(const SoftSegment<T>& s, T score) {
  for (int64_t i = 0; i < s.count; i += kLanes<T>)
    if (const uint32_t bits = equal_bits<T>(load(s.scores + i), splat(score))) return i + __builtin_ctz(bits);
  return s.count;
}

template <class T>
void end_with_nothing(SoftSegment<T>& s) {  // the lanes behind the last candidate are out, and overlap nothing
  for (int64_t i = s.count; i < s.count + kSoftRoom; ++i) {
    for (int d = 0; d < 4; ++d) s.boxes[d][i] = T(0);
    s.areas[i] = T(0);
    s.scores[i] = quiet_nan<T>();
  }
}

template <class T> int64_t drop_the_out(SoftSegment<T>& s) {
  int64_t kept = 0;
  for (int64_t i = 0; i < s.count; ++i) {
    if (s.scores[i] != s.scores[i]) continue;
    for (int d = 0; d < 4; ++d) s.boxes[d][kept] = s.boxes[d][i];
    s.areas[kept] = s.areas[i];
    s.scores[kept] = s.scores[i];
    s.indices[kept++] = s.indices[i];
  }
  s.count = kept;
  end_with_nothing(s);
  return kept;
}

template <class T> void select(SoftSegment<T>& s) {
  int64_t next_check = 0, at = 0;
  end_with_nothing(s);
  T highest = T(-__builtin_inf());
  for (int64_t i = 0; i < s.count; ++i) highest = larger(highest, s.scores[i]);  // the first where the second is NaN
  for (;;) {
    if (s.selected < s.leading) at = s.selected;
    else if ((at = first_with(s, highest)) == s.count) return;
    const Box<T> best{s.boxes[0][at], s.boxes[1][at], s.boxes[2][at], s.boxes[3][at]};
    s.order[s.selected] = s.indices[at];
    s.final_scores[s.selected++] = s.scores[at];
    s.scores[at] = quiet_nan<T>();
    highest = lower_all(s, best);
    if (s.selected >= s.leading && s.selected >= next_check) next_check = s.selected + drop_the_out(s) / 8 + 1;
  }
}

}  // namespace

void soft_nms_select(bool wide, void* segment) {
  wide ? select(*static_cast<SoftSegment<double>*>(segment)) : select(*static_cast<SoftSegment<float>*>(segment));
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include <functional>
#include <queue>
#include <tuple>

#include "nms_order.h"

namespace nasdet {
namespace {

constexpr int64_t kParallelPairs = 1 << 22;  // fewer take less time than waking threads

struct Settings {
  int method;
  double threshold, sigma, min_score;
};

// The selections of every class, class by class.
template <class T> struct Selections {
  std::vector<int64_t> starts;  // of each class's room in order and scores
  std::vector<int64_t> counts;
  Buffer<uint32_t> order;
  Buffer<T> scores;
};

template <class S, class T>
void select_class(const BoxList& list, const uint32_t* members, int64_t count, const Settings& settings,
                  Selections<T>& out, size_t place) {
  const int64_t room = count + kSoftRoom;
  Buffer<T> memory(6 * room);
  Buffer<uint32_t> indices(room);
  SoftSegment<T> s{};
  for (int d = 0; d < 4; ++d) s.boxes[d] = memory.get() + d * room;
  s.areas = memory.get() + 4 * room;
  s.scores = memory.get() + 5 * room;
  s.indices = indices.get();
  const auto add = [&](uint32_t index, T score) {
    const S* row = static_cast<const S*>(list.boxes) + int64_t(index) * list.box_stride;
    T box[4];
    for (int64_t d = 0; d < 4; ++d) s.boxes[d][s.count] = box[d] = widened(row[d * list.coordinate_stride]);
    s.areas[s.count] = box_area(Box<T>{box[0], box[1], box[2], box[3]});
    s.scores[s.count] = score;
    s.indices[s.count++] = index;
  };
  const auto score_of = [&](int64_t i) {
    return T(widened(static_cast<const S*>(list.scores)[int64_t(members ? members[i] : i) * list.score_stride]));
  };
  for (const bool leading : {true, false}) {
    for (int64_t i = 0; i < count; ++i) {
      const T score = score_of(i);
      if ((score != score) == leading && !(score < T(settings.min_score)))
        add(members ? members[i] : uint32_t(i), score);
    }
    if (leading) s.leading = s.count;
  }
  s.method = settings.method;
  s.threshold = settings.threshold;
  s.sigma = settings.sigma;
  s.min_score = settings.min_score;
  s.order = out.order.get() + out.starts[place];
  s.final_scores = out.scores.get() + out.starts[place];
  NASDET_KERNEL(soft_nms_select)(sizeof(T) == 8, &s);
  out.counts[place] = s.selected;
}

// Calls f(index, score) for all selections, the best of the classes' next ones first, ties by index.
template <class T, class F> void merge(const Selections<T>& all, F f) {
  using Head = std::tuple<uint64_t, uint32_t, size_t, int64_t>;  // key, index, class, position
  std::priority_queue<Head, std::vector<Head>, std::greater<Head>> heads;
  const auto push = [&](size_t c, int64_t i) {
    if (i < all.counts[c])
      heads.emplace(descending_key(all.scores[all.starts[c] + i]), all.order[all.starts[c] + i], c, i);
  };
  for (size_t c = 0; c < all.counts.size(); ++c) push(c, 0);
  while (!heads.empty()) {
    const auto [key, index, c, i] = heads.top();
    heads.pop();
    f(index, all.scores[all.starts[c] + i]);
    push(c, i + 1);
  }
}

void store_score(void* scores, int storage, int64_t i, double value) {
  switch (storage) {
    case 1:
      static_cast<double*>(scores)[i] = value;
      return;
    case 2:
      NASDET_ISA::store_part(static_cast<BFloat16*>(scores) + i, NASDET_ISA::splat(float(value)), 1);
      return;
    case 3:
      static_cast<Half*>(scores)[i].bits = NASDET_ISA::float_to_half(float(value));
      return;
    default:
      static_cast<float*>(scores)[i] = float(value);
  }
}

template <class S> std::tuple<Tensor, Tensor> run(const Tensor& boxes, const BoxList& list, const Settings& settings) {
  using T = NASDET_ISA::arithmetic_t<S>;
  const int64_t n = list.count;
  Selections<T> all{{0, n}, {}, Buffer<uint32_t>(n), Buffer<T>(n)};
  Buffer<uint32_t> members;
  if (list.classes && n) {
    Buffer<uint32_t> identity(n);
    for (int64_t i = 0; i < n; ++i) identity[i] = uint32_t(i);
    Groups groups = group_by_class(list, identity.get());
    all.starts = std::move(groups.starts);
    members = std::move(groups.ranks);
  }
  all.counts.resize(all.starts.size() - 1);
  const int64_t classes = int64_t(all.counts.size());
  const auto select_classes = [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      select_class<S, T>(list, members.get() ? members.get() + all.starts[c] : nullptr,
                         all.starts[c + 1] - all.starts[c], settings, all, size_t(c));
  };
  if (classes > 1 && n * n / classes >= kParallelPairs) torch::stable::parallel_for(0, classes, 1, select_classes);
  else select_classes(0, classes);
  int64_t selected = 0;
  for (const int64_t count : all.counts) selected += count;
  Tensor keep = torch::stable::new_empty(boxes, {selected}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(boxes, {selected});
  int64_t* index = static_cast<int64_t*>(keep.mutable_data_ptr());
  void* score = scores.mutable_data_ptr();
  int64_t i = 0;
  merge(all, [&](uint32_t box, T value) {
    index[i] = box;
    store_score(score, list.storage, i++, double(value));
  });
  return {keep, scores};
}

std::tuple<Tensor, Tensor> soft_nms(Tensor boxes, Tensor scores, std::optional<Tensor> classes, int64_t method,
                                    double iou_threshold, double sigma, double min_score) {
  check_cpu_boxes(boxes, scores, classes, iou_threshold, 0);
  STD_TORCH_CHECK(method >= kLinear && method <= kNaive, "method must be 0, 1 or 2, got ", method);
  STD_TORCH_CHECK(sigma > 0, "sigma must be positive, got ", sigma);
  STD_TORCH_CHECK(min_score == min_score, "min_score must be a number, got nan");
  const BoxList list = list_of(boxes, scores, classes);
  const Settings settings{int(method), iou_threshold, sigma, min_score};
  return with_storage(list.storage, [&](auto stored) { return run<decltype(stored)>(boxes, list, settings); });
}

}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) { m.impl("soft_nms", TORCH_BOX(&nasdet::soft_nms)); }
#endif
