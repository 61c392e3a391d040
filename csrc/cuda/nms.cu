// Launches the kernels of nms.cuh for nasdet::nms and nasdet::nms_padded.
#include "nms.cuh"

#include <tuple>

#include "box_order.h"

namespace nasdet::cuda {
namespace {

// Marks the kept boxes in sorted.kept and counts them. Sizes alone decide what is launched.
template <class T>
void suppress(const BoxSource& source, const Sorted<T>& sorted, const RunPair<T>& pair, double threshold,
              cudaStream_t stream) {
  sort_boxes(source, sorted, pair, stream);
  suppress_kernel<T><<<unsigned(source.images * sorted.tiles), kNmsThreads, 0, stream>>>(sorted, source.images,
                                                                                         source.count, T(threshold));
  check_launch("suppress_kernel");
}

template <class T>
void list_kept(const BoxSource& source, const Sorted<T>& sorted, int64_t places, int64_t* index, int64_t* used,
               cudaStream_t stream) {
  const int64_t blocks = (source.count + kListRanks - 1) / kListRanks;
  list_kept_kernel<<<unsigned(source.images * blocks), kListThreads, 0, stream>>>(
      sorted.order, sorted.kept, sorted.counts, source.count, sorted.tiles * kWords, blocks, places, index, used);
  check_launch("list_kept_kernel");
}

template <class T> void take_all(Workspace& workspace, const BoxSource& source, Sorted<T>& sorted, RunPair<T>& pair) {
  sorted.tiles = (source.count + kTile - 1) / kTile;
  take_sorted(workspace, source, sorted);
  take_runs(workspace, source, pair);
  workspace.take(sorted.words, source.images * sorted.tiles * kWords);
  workspace.take(sorted.kept, source.images * sorted.tiles * kWords);
  workspace.take(sorted.ticket, 1);
}

template <class T> Tensor nms_as(const Tensor& boxes, const BoxSource& source, double threshold, cudaStream_t stream) {
  Sorted<T> sorted{};
  RunPair<T> pair{};
  const Workspace workspace(boxes, [&](Workspace& w) { take_all(w, source, sorted, pair); });
  suppress(source, sorted, pair, threshold, stream);
  const int64_t kept = read_count(sorted.counts, stream);
  Tensor index = torch::stable::new_empty(boxes, {kept}, ScalarType::Long);
  list_kept(source, sorted, kept, static_cast<int64_t*>(index.mutable_data_ptr()), nullptr, stream);
  return index;
}

Tensor nms(Tensor boxes, Tensor scores, std::optional<Tensor> classes, double iou_threshold) {
  const BoxSource source = checked_source(boxes, scores, classes, iou_threshold, 0);
  if (source.count == 0) return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  const DeviceGuard guard(boxes.get_device_index());
  const cudaStream_t stream = current_stream(boxes);
  return source.storage == 1 ? nms_as<double>(boxes, source, iou_threshold, stream)
                             : nms_as<float>(boxes, source, iou_threshold, stream);
}

template <class T>
void nms_padded_as(const Tensor& boxes, const BoxSource& source, double threshold, Tensor& index, Tensor& used,
                   cudaStream_t stream) {
  Sorted<T> sorted{};
  RunPair<T> pair{};
  const Workspace workspace(boxes, [&](Workspace& w) { take_all(w, source, sorted, pair); });
  suppress(source, sorted, pair, threshold, stream);
  list_kept(source, sorted, index.size(1), static_cast<int64_t*>(index.mutable_data_ptr()),
            static_cast<int64_t*>(used.mutable_data_ptr()), stream);
}

std::tuple<Tensor, Tensor> nms_padded(Tensor boxes, Tensor scores, std::optional<Tensor> classes, double iou_threshold,
                                      int64_t max_out) {
  const BoxSource source = checked_source(boxes, scores, classes, iou_threshold, 1);
  STD_TORCH_CHECK(max_out >= 0, "max_out must be at least 0, got ", max_out);
  Tensor index = torch::stable::new_empty(boxes, {source.images, max_out}, ScalarType::Long);
  Tensor used = torch::stable::new_empty(boxes, {source.images}, ScalarType::Long);
  if (source.images == 0) return {index, used};
  const DeviceGuard guard(boxes.get_device_index());
  if (source.count == 0) {
    torch::stable::fill_(index, -1);
    torch::stable::zero_(used);
    return {index, used};
  }
  const cudaStream_t stream = current_stream(boxes);
  source.storage == 1 ? nms_padded_as<double>(boxes, source, iou_threshold, index, used, stream)
                      : nms_padded_as<float>(boxes, source, iou_threshold, index, used, stream);
  return {index, used};
}

}  // namespace
}  // namespace nasdet::cuda

STABLE_TORCH_LIBRARY_IMPL(nasdet, CUDA, m) {
  m.impl("nms", TORCH_BOX(&nasdet::cuda::nms));
  m.impl("nms_padded", TORCH_BOX(&nasdet::cuda::nms_padded));
}
