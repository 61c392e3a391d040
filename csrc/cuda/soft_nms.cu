// Launches the kernels of soft_nms.cuh for nasdet::soft_nms.
#include "soft_nms.cuh"

#include <algorithm>
#include <tuple>

#include "box_order.h"

namespace nasdet::cuda {
namespace {

struct Settings {
  int method;
  double threshold, sigma, min_score;
};

// The order of selection: with scores that are never negative they fall, and the order is that of the lowered scores. What is
// not selected has -infinity and comes last; NaN scores come first.
template <class T>
void order_selections(const BoxSource& source, const SoftState<T>& state, const RunPair<T>& pair, cudaStream_t stream) {
  BoxSource lowered{};
  lowered.scores = state.lowered;
  lowered.score_row = 1;
  lowered.images = 1, lowered.count = source.count;
  lowered.storage = sizeof(T) == 8 ? 1 : 0;
  Sorted<T> sorted{};
  sorted.order = state.chosen;
  sort_boxes(lowered, sorted, pair, stream);
}

template <class T>
std::tuple<Tensor, Tensor> soft_nms_as(const Tensor& boxes, const BoxSource& source, const Settings& given,
                                       cudaStream_t stream) {
  const SoftSettings<T> settings{T(given.threshold), T(given.sigma), T(given.min_score), given.method,
                                 !source.classes || !(T(given.min_score) >= T(0))};
  Sorted<T> sorted{};
  RunPair<T> pair{};
  SoftState<T> state{};
  state.scores = source.scores, state.score_row = source.score_row, state.storage = source.storage;
  const Workspace workspace(boxes, [&](Workspace& w) {
    take_sorted(w, source, sorted);
    take_runs(w, source, pair);
    w.take(state.score, source.count);
    w.take(state.state, source.count);
    w.take(state.lowered, source.count);
    w.take(state.chosen, source.count);
  });
  sort_boxes(source, sorted, pair, stream);
  const int64_t blocks = settings.whole ? 1 : (source.count + kSoftPiece - 1) / kSoftPiece;
  soft_nms_kernel<T><<<unsigned(blocks), kSoftThreads, 0, stream>>>(sorted, settings, state, source.count);
  check_launch("soft_nms_kernel");
  if (!settings.whole) order_selections(source, state, pair, stream);
  const int64_t selected = read_count(sorted.counts, stream);
  Tensor index = torch::stable::new_empty(boxes, {selected}, ScalarType::Long);
  Tensor scores = torch::stable::new_empty(boxes, {selected});
  if (selected == 0) return {index, scores};
  const int64_t list_blocks = std::min<int64_t>((selected + kChosenThreads - 1) / kChosenThreads, 1 << 16);
  list_chosen_kernel<T><<<unsigned(list_blocks), kChosenThreads, 0, stream>>>(
      state.chosen, state.lowered, selected, static_cast<int64_t*>(index.mutable_data_ptr()), scores.mutable_data_ptr(),
      source.storage);
  check_launch("list_chosen_kernel");
  return {index, scores};
}

std::tuple<Tensor, Tensor> soft_nms(Tensor boxes, Tensor scores, std::optional<Tensor> classes, int64_t method,
                                    double iou_threshold, double sigma, double min_score) {
  const BoxSource source = checked_source(boxes, scores, classes, iou_threshold, 0);
  STD_TORCH_CHECK(method >= kLinear && method <= kNaive, "method must be 0, 1 or 2, got ", method);
  STD_TORCH_CHECK(sigma > 0, "sigma must be positive, got ", sigma);
  STD_TORCH_CHECK(min_score == min_score, "min_score must be a number, got nan");
  if (source.count == 0)
    return {torch::stable::new_empty(boxes, {0}, ScalarType::Long), torch::stable::new_empty(boxes, {0})};
  const DeviceGuard guard(boxes.get_device_index());
  const cudaStream_t stream = current_stream(boxes);
  const Settings settings{int(method), iou_threshold, sigma, min_score};
  return source.storage == 1 ? soft_nms_as<double>(boxes, source, settings, stream)
                             : soft_nms_as<float>(boxes, source, settings, stream);
}

}  // namespace
}  // namespace nasdet::cuda

STABLE_TORCH_LIBRARY_IMPL(nasdet, CUDA, m) { m.impl("soft_nms", TORCH_BOX(&nasdet::cuda::soft_nms)); }
