// Runs the kernels of soft_nms.cuh on the CPU, as their launcher does, against the plain loop over the whole set: methods, classes,
// ties, NaN, scores at the limit, strides, both thread orders. Prints the number of checks.
#include "nms_problem.h"
#include "soft_nms.cuh"

#include <cstdio>

using namespace nasdet::cuda;

template <class T> struct Selection {
  std::vector<int64_t> index;
  std::vector<T> scores;  // as stored, widened
};

template <class T> bool same_values(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](T x, T y) { return x == y || (x != x && y != y); });
}

template <class S>
Selection<typename Storage<S>::arithmetic> run(const Problem<S>& problem,
                                               const SoftSettings<typename Storage<S>::arithmetic>& settings,
                                               uint32_t run_length) {
  using T = typename Storage<S>::arithmetic;
  const BoxSource source = problem.source();
  const int64_t count = source.count;
  const Workspace<T> workspace(source);
  Sorted<T> sorted = workspace.sorted();
  sorted.words = nullptr, sorted.kept = nullptr, sorted.ticket = nullptr;
  sort(source, sorted, workspace, run_length, 3);
  const Memory<T> score(count), lowered(count);
  const Memory<uint32_t> state_of(count), chosen(count);
  const SoftState<T> state{source.scores,  source.score_row, source.storage, score.get(),
                           state_of.get(), lowered.get(),    chosen.get()};
  shim::launch(unsigned(settings.whole ? 1 : (count + kSoftPiece - 1) / kSoftPiece), kFewThreads, 0, soft_nms_kernel<T>,
               sorted, settings, state, count);
  if (!settings.whole) {
    BoxSource again{};
    again.scores = lowered.get();
    again.score_row = 1;
    again.images = 1;
    again.count = count;
    again.storage = sizeof(T) == 8 ? 1 : 0;
    Sorted<T> order{};
    order.order = chosen.get();
    sort(again, order, workspace, run_length, 3);
  }
  const int64_t selected = int64_t(workspace.counts[0]);
  const Memory<int64_t> index(selected);
  const Memory<S> values(selected);
  shim::launch(2, kChosenThreads, 0, list_chosen_kernel<T>, static_cast<const uint32_t*>(chosen.get()),
               static_cast<const T*>(lowered.get()), selected, index.get(), static_cast<void*>(values.get()),
               int32_t(Storage<S>::code));
  Selection<T> result;
  for (int64_t i = 0; i < selected; ++i)
    result.index.push_back(index[i]), result.scores.push_back(Problem<S>::value(values[i]));
  return result;
}

template <class S>
Selection<typename Storage<S>::arithmetic> plain(const Problem<S>& problem,
                                                 const SoftSettings<typename Storage<S>::arithmetic>& settings) {
  using T = typename Storage<S>::arithmetic;
  const int64_t count = problem.setup.count;
  std::vector<T> scores;
  for (int64_t i = 0; i < count; ++i) scores.push_back(problem.score(0, i));
  std::vector<bool> out;
  for (const T score : scores) out.push_back(score < settings.min_score);
  Selection<T> result;
  for (;;) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i) {
      if (out[size_t(i)]) continue;
      const T mine = scores[size_t(i)], other = best < 0 ? T(0) : scores[size_t(best)];
      if (best < 0 || (mine != mine ? other == other : mine > other)) best = i;
    }
    if (best < 0) return result;
    out[size_t(best)] = true;
    result.index.push_back(best);
    result.scores.push_back(Problem<S>::value(Storage<S>::of(scores[size_t(best)])));
    for (int64_t i = 0; i < count; ++i) {
      if (out[size_t(i)] || problem.of_class(0, i) != problem.of_class(0, best)) continue;
      const T iou = Problem<S>::iou(problem.box(0, best), problem.box(0, i));
      T weight = 1;
      if (settings.method == kGaussian) weight = iou != iou ? T(1) : std::exp(-(iou * iou) / settings.sigma);
      else if (iou > settings.threshold) weight = settings.method == kLinear ? 1 - iou : T(0);
      T& score = scores[size_t(i)];
      score = weight == 0 && score == score ? T(0) : score * weight;
      if (score < settings.min_score) out[size_t(i)] = true;
    }
  }
}

template <class S>
void check(const Setup& setup, std::mt19937& random, bool degenerate, int method, double threshold, double min_score,
           uint32_t run_length = 1 << 20) {
  using T = typename Storage<S>::arithmetic;
  const std::string what = text(setup) + ", storage " + std::to_string(Storage<S>::code) + ", method " +
                           std::to_string(method) + ", lowest score " + std::to_string(min_score);
  const Problem<S> problem(setup, random, degenerate);
  const SoftSettings<T> settings{T(threshold), T(0.4), T(min_score), method, !setup.classes || !(min_score >= 0)};
  shim::reverse = false;
  const Selection<T> result = run(problem, settings, run_length);
  const Selection<T> expected = plain(problem, settings);
  expect(result.index == expected.index, "a selection is wrong: " + what);
  expect(same_values(result.scores, expected.scores), "a score is wrong: " + what);
  if (setup.count > 50) return;
  shim::reverse = true;
  const Selection<T> again = run(problem, settings, run_length);
  expect(again.index == result.index && same_values(again.scores, result.scores),
         "another selection in reverse thread order: " + what);
}

template <class S> void check_storage() {
  std::mt19937 random(Storage<S>::code);
  for (const int method : {kLinear, kGaussian, kNaive}) {
    check<S>({1, 40, 0, 9, 2, false}, random, false, method, 0.3, 0.001);
    check<S>({1, 49, 4, 7, 2, true}, random, true, method, 0.3, method == kLinear ? 0.0 : 0.05);
  }
}

void check_sizes() {
  std::mt19937 random(3);
  for (const int64_t count : {1, 2, 31, 33, 70})
    check<float>({1, count, count > 31 ? 3 : 0, 9, 2, false}, random, true, kLinear, 0.3, 0.01);
  check<float>({1, 200, -1, 9, 2, false}, random, true, kGaussian, 0.3, 0.001,
               64);                                                         // classes of one box, as many as boxes
  check<float>({1, 300, 1, 9, 1, false}, random, false, kNaive, 0.1, 0.3);  // several boxes a thread, few selections
  check<float>({1, 60, 3, 9, 2, false}, random, true, kLinear, 0.3, -10);   // negative scores rise
  check<float>({1, 60, 0, 9, 2, false}, random, true, kGaussian, 0.3, -std::numeric_limits<double>::infinity());
  check<double>({1, 60, 2, 9, 2, false}, random, true, kNaive, -0.5, 0);
  check<float>({1, 40, 2, 9, 2, false}, random, false, kLinear, 0.3, 7);  // nothing is left
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "float") check_storage<float>();
  if (what == "double") check_storage<double>();
  if (what == "half") check_storage<__half>();
  if (what == "bfloat16") check_storage<__nv_bfloat16>();
  if (what == "sizes") check_sizes();
  std::printf("%d checks\n", checks);
}
