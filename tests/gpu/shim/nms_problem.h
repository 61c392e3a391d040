// Boxes, and the suppression of them in the plainest way, for the drivers of the suppression family's kernels.
#pragma once
#include "host_shim.h"
#include "box_order.cuh"

#include <algorithm>
#include <limits>
#include <map>
#include <random>

namespace nasdet::cuda {

inline int checks = 0;

inline void expect(bool right, const std::string& what) {
  ++checks;
  if (!right) throw std::runtime_error(what);
}

template <class S> struct Storage;
template <> struct Storage<float> {
  static constexpr int code = 0;
  using arithmetic = float;
  static float of(float v) { return v; }
};
template <> struct Storage<double> {
  static constexpr int code = 1;
  using arithmetic = double;
  static double of(double v) { return v; }
};
template <> struct Storage<__nv_bfloat16> {
  static constexpr int code = 2;
  using arithmetic = float;
  static __nv_bfloat16 of(float v) { return __float2bfloat16_rn(v); }
};
template <> struct Storage<__half> {
  static constexpr int code = 3;
  using arithmetic = float;
  static __half of(float v) { return __float2half_rn(v); }
};

// Device memory of exactly `count` elements, so that the address sanitizer sees the first one beyond; every byte 0xFF at first.
template <class X> struct Memory {
  std::unique_ptr<X[]> block;
  explicit Memory(int64_t count) : block(new X[size_t(count)]) {
    std::memset(static_cast<void*>(block.get()), 0xFF, size_t(count) * sizeof(X));
  }
  X* get() const { return block.get(); }
  X& operator[](int64_t i) const { return block[size_t(i)]; }
};

struct Setup {
  int64_t images, count;
  int classes;    // 0: none; 1: all the same; -1: every box its own, from the whole range of int64
  int kinds;      // different boxes of a cluster: few give many duplicates and ties
  double spread;  // of the clusters' centres
  bool strided;
};

inline std::string text(const Setup& s) {
  return std::to_string(s.images) + " x " + std::to_string(s.count) + " boxes, " + std::to_string(s.classes) +
         " classes, " + std::to_string(s.kinds) + " kinds";
}

template <class S> struct Problem {
  using T = typename Storage<S>::arithmetic;
  Setup setup;
  int64_t row, step;  // elements from box to box, and from coordinate to coordinate
  Memory<S> boxes, scores;
  Memory<int64_t> classes;

  Problem(const Setup& s, std::mt19937& random, bool degenerate)
      : setup(s),
        row(s.strided ? 11 : 4),
        step(s.strided ? 2 : 1),
        boxes(s.images * s.count * row),
        scores(s.images * s.count * (s.strided ? 3 : 1)),
        classes(s.images * s.count * (s.strided ? 2 : 1)) {
    std::uniform_real_distribution<double> unit(0, 1);
    const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < s.images * s.count; ++i) {
      const double x = std::floor(unit(random) * s.spread) * 30, y = std::floor(unit(random) * s.spread) * 30;
      const double dx = std::floor(unit(random) * s.kinds), dy = std::floor(unit(random) * s.kinds);
      double box[4] = {x + dx, y + dy, x + 20 + dy, y + 20 + dx};
      double score = std::floor(unit(random) * 4 * s.kinds) / (4 * s.kinds);
      const int kind = degenerate ? int(unit(random) * 12) : 99;
      if (kind == 0) box[2] = box[0];
      if (kind == 1) std::swap(box[0], box[2]);
      if (kind == 2) box[int(unit(random) * 4)] = nan;
      if (kind == 3) box[2] = inf;
      if (kind == 4) score = nan;
      if (kind == 5) score = unit(random) < 0.5 ? -0.0 : 0.0;
      if (kind == 6) score = -score;
      if (kind == 7) score = unit(random) < 0.5 ? inf : -inf;
      for (int d = 0; d < 4; ++d) boxes[i * row + d * step] = Storage<S>::of(T(box[d]));
      scores[i * (s.strided ? 3 : 1)] = Storage<S>::of(T(score));
      int64_t c = s.classes > 0 ? int64_t(unit(random) * s.classes) - s.classes / 2 : 0;
      if (s.classes < 0) c = int64_t(random() * 0x100000001ull << 17 ^ random());
      if (s.classes > 2 && c == 0) c = std::numeric_limits<int64_t>::min();
      if (s.classes > 2 && c == 1) c = std::numeric_limits<int64_t>::max();
      classes[i * (s.strided ? 2 : 1)] = c;
    }
  }

  BoxSource source() const {
    BoxSource s{};
    s.boxes = boxes.get(), s.scores = scores.get(), s.classes = setup.classes ? classes.get() : nullptr;
    s.box_row = row, s.box_column = step, s.score_row = setup.strided ? 3 : 1, s.class_row = setup.strided ? 2 : 1;
    s.box_image = setup.count * s.box_row;
    s.score_image = setup.count * s.score_row;
    s.class_image = setup.count * s.class_row;
    s.images = setup.images, s.count = setup.count, s.storage = Storage<S>::code;
    return s;
  }

  Box<T> box(int64_t image, int64_t i) const {
    const S* at = boxes.get() + (image * setup.count + i) * row;
    return {value(at[0]), value(at[step]), value(at[2 * step]), value(at[3 * step])};
  }
  T score(int64_t image, int64_t i) const { return value(scores[(image * setup.count + i) * (setup.strided ? 3 : 1)]); }
  int64_t of_class(int64_t image, int64_t i) const {
    return setup.classes ? classes[(image * setup.count + i) * (setup.strided ? 2 : 1)] : 0;
  }
  static T value(S v) { return load_as<T>(&v, Storage<S>::code, 0); }

  // IoU as a plain division, not through the shared header.
  static T iou(const Box<T>& a, const Box<T>& b) {
    const auto side = [](T low_a, T low_b, T high_a, T high_b) {
      const T length = std::min(high_a, high_b) - std::max(low_a, low_b);
      return length > 0 ? length : T(0);
    };
    volatile T area_a = (a.x2 - a.x1) * (a.y2 - a.y1), area_b = (b.x2 - b.x1) * (b.y2 - b.y1);
    volatile T inter = side(a.x1, b.x1, a.x2, b.x2) * side(a.y1, b.y1, a.y2, b.y2);
    return inter / (area_a + area_b - inter);
  }

  std::vector<int64_t> order(int64_t image) const {
    std::vector<int64_t> all;
    for (int64_t i = 0; i < setup.count; ++i) all.push_back(i);
    std::stable_sort(all.begin(), all.end(), [&](int64_t a, int64_t b) {
      const T x = score(image, a), y = score(image, b);
      return x != x ? y == y : x > y;
    });
    return all;
  }

  std::vector<int64_t> kept(int64_t image, T threshold) const {
    std::vector<int64_t> result;
    std::map<int64_t, std::vector<Box<T>>> by_class;
    for (const int64_t i : order(image)) {
      const Box<T> mine = box(image, i);
      std::vector<Box<T>>& others = by_class[of_class(image, i)];
      if (std::any_of(others.begin(), others.end(), [&](const Box<T>& other) { return iou(other, mine) > threshold; }))
        continue;
      others.push_back(mine);
      result.push_back(i);
    }
    return result;
  }
};

// What take_sorted and take_runs of the launcher allocate.
template <class T> struct Workspace {
  int64_t total, tiles;
  bool by_class;
  Memory<uint32_t> order, rank_of, index_of, kept;
  Memory<int64_t> classes;
  Memory<BoxCell<T>> boxes;
  Memory<unsigned long long> words, counts;
  Memory<unsigned> ticket;
  Memory<ScoreKey<T>> scores[2];
  Memory<ClassKey<T>> keys[2];

  explicit Workspace(const BoxSource& s)
      : total(s.images * s.count),
        tiles((s.count + kTile - 1) / kTile),
        by_class(s.classes != nullptr),
        order(total),
        rank_of(by_class ? total : 0),
        index_of(by_class ? total : 0),
        kept(s.images * tiles * kWords),
        classes(by_class ? total : 0),
        boxes(total),
        words(s.images * tiles * kWords),
        counts(s.images),
        ticket(1),
        scores{Memory<ScoreKey<T>>(total), Memory<ScoreKey<T>>(total)},
        keys{Memory<ClassKey<T>>(by_class ? total : 0), Memory<ClassKey<T>>(by_class ? total : 0)} {}

  Sorted<T> sorted() const {
    Sorted<T> s{};
    s.order = order.get();
    s.boxes = boxes.get();
    s.words = words.get();
    s.kept = kept.get();
    s.counts = counts.get();
    s.ticket = ticket.get();
    s.tiles = tiles;
    if (by_class) s.rank_of = rank_of.get(), s.index_of = index_of.get(), s.classes = classes.get();
    return s;
  }
  Runs<T> runs(int i) const { return {scores[i].get(), by_class ? keys[i].get() : nullptr}; }
};

constexpr int kFewThreads = 64;  // the blocks of the launchers take eight times as long here

// As the launcher sorts, with shorter runs and fewer of them a merge.

template <class T>
void sort(const BoxSource& source, const Sorted<T>& sorted, const Workspace<T>& workspace, uint32_t run, uint32_t most,
          int threads = kFewThreads) {
  const unsigned blocks = unsigned(source.images * ((source.count + kPiece - 1) / kPiece));
  const uint32_t count = uint32_t(source.count);
  if (run > count) run = count;
  shim::launch(blocks, threads, 0, order_runs_kernel<T>, source, sorted, workspace.runs(0), run);
  for (int from = 0; run < count; from = 1 - from) {
    const uint32_t fan = std::min(most, (count - 1) / run + 1);
    shim::launch(dim3(blocks, source.classes ? 2 : 1), threads, 0, merge_runs_kernel<T>, source, sorted,
                 workspace.runs(from), workspace.runs(1 - from), run, fan);
    run = std::min(run * fan, count);
  }
}

}  // namespace nasdet::cuda
