// Runs the kernels of box_order.cuh and nms.cuh on the CPU, as their launcher does, against plain greedy suppression: sizes around
// words and tiles, ties, duplicates, NaN, classes that span tiles, batches, strides, both thread orders. Prints the number of checks.
#include "nms_problem.h"
#include "nms.cuh"

#include <cstdio>

using namespace nasdet::cuda;

template <class T> struct Result {
  std::vector<int64_t> index, used;
  std::vector<uint32_t> order, index_of;
};

template <class S>
Result<typename Storage<S>::arithmetic> run(const Problem<S>& problem, typename Storage<S>::arithmetic threshold,
                                            int64_t places, uint32_t run_length, uint32_t fan) {
  using T = typename Storage<S>::arithmetic;
  const BoxSource source = problem.source();
  const Workspace<T> workspace(source);
  const Sorted<T> sorted = workspace.sorted();
  const int64_t images = source.images, count = source.count, blocks = (count + kListRanks - 1) / kListRanks;
  sort(source, sorted, workspace, run_length, fan, count == 1000 && run_length > 1000 ? kSortThreads : kFewThreads);
  shim::launch(unsigned(images * sorted.tiles), kNmsThreads, 0, suppress_kernel<T>, sorted, images, count, threshold);
  const Memory<int64_t> index(images * places), used(images);
  shim::launch(unsigned(images * blocks), kListThreads, 0, list_kept_kernel, static_cast<const uint32_t*>(sorted.order),
               static_cast<const uint32_t*>(sorted.kept), static_cast<const unsigned long long*>(sorted.counts), count,
               sorted.tiles * kWords, blocks, places, index.get(), used.get());
  Result<T> result;
  result.index.assign(index.get(), index.get() + images * places);
  result.used.assign(used.get(), used.get() + images);
  result.order.assign(sorted.order, sorted.order + images * count);
  if (sorted.index_of) result.index_of.assign(sorted.index_of, sorted.index_of + images * count);
  return result;
}

template <class S>
void check_order(const Problem<S>& problem, const Result<typename Storage<S>::arithmetic>& result,
                 const std::string& what) {
  const int64_t count = problem.setup.count;
  for (int64_t image = 0; image < problem.setup.images; ++image) {
    const std::vector<int64_t> order = problem.order(image);
    expect(std::equal(order.begin(), order.end(), result.order.begin() + image * count),
           "the order by score is wrong: " + what);
    if (result.index_of.empty()) continue;
    std::vector<int64_t> by_class = order;
    std::stable_sort(by_class.begin(), by_class.end(),
                     [&](int64_t a, int64_t b) { return problem.of_class(image, a) < problem.of_class(image, b); });
    expect(std::equal(by_class.begin(), by_class.end(), result.index_of.begin() + image * count),
           "the order by class is wrong: " + what);
  }
}

template <class S>
void check(const Setup& setup, std::mt19937& random, bool degenerate, double threshold, int64_t places,
           uint32_t run_length = 1 << 20, uint32_t fan = 64) {
  using T = typename Storage<S>::arithmetic;
  const std::string what = text(setup) + ", storage " + std::to_string(Storage<S>::code) + ", threshold " +
                           std::to_string(threshold) + ", runs of " + std::to_string(run_length);
  const Problem<S> problem(setup, random, degenerate);
  shim::reverse = false;
  const Result<T> result = run(problem, T(threshold), places, run_length, fan);
  if (setup.count <= 300) {
    shim::reverse = true;
    const Result<T> again = run(problem, T(threshold), places, run_length, fan);
    expect(result.index == again.index && result.used == again.used, "another result in reverse thread order: " + what);
  }
  check_order(problem, result, what);
  for (int64_t image = 0; image < setup.images; ++image) {
    const std::vector<int64_t> kept = problem.kept(image, T(threshold));
    const int64_t filled = std::min(int64_t(kept.size()), places);
    expect(result.used[size_t(image)] == filled, "the count is wrong: " + what);
    for (int64_t p = 0; p < places; ++p)
      expect(result.index[size_t(image * places + p)] == (p < filled ? kept[size_t(p)] : -1),
             "a kept box is wrong: " + what);
  }
}

template <class S> void check_storage() {
  std::mt19937 random(Storage<S>::code);
  for (const int64_t count : {1, 2, 31, 33, 63, 64, 65, 127, 128, 129, 257}) {
    check<S>({1, count, 0, 6, 2, false}, random, false, 0.5, count);
    check<S>({1, count, 3, 8, 2, true}, random, true, 0.3, count);
  }
  check<S>({3, 130, 5, 5, 3, true}, random, true, 0.5, 40, 32, 3);
  check<S>({2, 290, -1, 3, 2, false}, random, true, 0.5, 300, 64, 2);
}

void check_many() {
  std::mt19937 random(7);
  check<float>({1, 1000, 0, 9, 4, false}, random, false, 0.5, 1000);  // one class over eight tiles
  check<float>({1, 1000, 0, 9, 30, false}, random, true, 0.3, 1000);  // most are kept
  check<float>({1, 1000, 80, 9, 2, false}, random, false, 0.5, 1000);
  check<float>({1, 1000, 2, 12, 3, false}, random, true, 0.4, 100, 32, 8);  // classes begin within tiles and span them
  check<float>({1, 1000, -1, 12, 3, false}, random, true, 0.4, 1100, 96, 4);
  check<double>({1, 700, 3, 12, 3, false}, random, true, 0.4, 700, 32, 64);
  check<float>({2, 2100, 4, 12, 6, false}, random, false, 0.5, 5000, 512, 64);  // more than one block of the list
}

void check_thresholds() {
  std::mt19937 random(8);
  for (const double threshold : {-0.5, 0.0, 0.25, 1.0, 2.0})
    for (const int classes : {0, 4}) check<float>({1, 280, classes, 4, 3, false}, random, true, threshold, 280);
  for (const int64_t places : {0, 1, 279, 281}) check<float>({2, 280, 2, 9, 9, false}, random, false, 0.5, places);
  std::mt19937 again(9);
  for (int i = 0; i < 40; ++i)
    check<float>({1 + i % 2, 1 + int64_t(again() % 300), int(again() % 5) - 1, 1 + int(again() % 12),
                  double(1 + again() % 6), i % 3 == 0},
                 again, i % 2 == 0, 0.1 * double(again() % 10), 64, 32u * (1 + again() % 5), 2 + again() % 5);
}

// A chain: each box overlaps only the next. Every second one is kept, and every decision needs the one before it.
void check_chain() {
  for (const int64_t count : {130, 400}) {
    std::mt19937 random(1);
    Problem<float> problem({1, count, 0, 1, 1, false}, random, false);
    for (int64_t i = 0; i < count; ++i) {
      const float box[4] = {float(6 * i), 0, float(6 * i + 10), 10};
      for (int d = 0; d < 4; ++d) problem.boxes[i * 4 + d] = box[d];
      problem.scores[i] = float(count - i);
    }
    shim::reverse = false;
    const Result<float> result = run(problem, 0.2f, count, 1 << 20, 64);
    expect(result.used[0] == count / 2, "the chain's count is wrong");
    for (int64_t p = 0; p < count / 2; ++p) expect(result.index[size_t(p)] == 2 * p, "a box of the chain is wrong");
  }
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "float") check_storage<float>();
  if (what == "double") check_storage<double>();
  if (what == "half") check_storage<__half>();
  if (what == "bfloat16") check_storage<__nv_bfloat16>();
  if (what == "many") check_many();
  if (what == "thresholds") check_thresholds();
  if (what == "chain") check_chain();
  std::printf("%d checks\n", checks);
}
