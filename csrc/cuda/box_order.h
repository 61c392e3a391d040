// Launcher side of box_order.cuh, shared by nms and soft_nms: checks, workspace, and the launches that sort.
#pragma once
#include <limits>
#include <optional>

#include "box_order.cuh"
#include "launch.h"
#include "nasdet/op_checks.h"

namespace nasdet::cuda {

// Checks what the ops of the family share, and says where the boxes lie; `leading` is 1 with a batch dimension, else 0.
inline BoxSource checked_source(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& classes,
                                double threshold, int64_t leading) {
  STD_TORCH_CHECK(boxes.is_cuda(), "boxes must be on a CUDA device");
  check_boxes(boxes, scores, classes, threshold, leading);
  BoxSource source{};
  source.boxes = boxes.const_data_ptr();
  source.scores = scores.const_data_ptr();
  source.images = leading ? boxes.size(0) : 1;
  source.count = boxes.size(leading);
  source.box_image = leading ? boxes.stride(0) : 0, source.score_image = leading ? scores.stride(0) : 0;
  source.box_row = boxes.stride(leading);
  source.box_column = boxes.stride(leading + 1);
  source.score_row = scores.stride(leading);
  if (classes) {
    source.classes = static_cast<const int64_t*>(classes->const_data_ptr());
    source.class_image = leading ? classes->stride(0) : 0, source.class_row = classes->stride(leading);
  }
  source.storage = storage_code(boxes, "boxes");
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(source.count == 0 || source.images <= most / source.count, "boxes must be at most ", most,
                  " in all images together, got ", source.images, " x ", source.count);
  return source;
}

// One allocation of PyTorch's, cut into arrays: counted first, then taken.
class Workspace {
 public:
  // f is called twice with this object; what take() returns the first time is null.
  template <class F> Workspace(const Tensor& like, F f) {
    f(*this);
    memory_ = torch::stable::new_empty(like, {int64_t(used_)}, ScalarType::Byte);
    start_ = static_cast<char*>(memory_.mutable_data_ptr());
    used_ = 0;
    f(*this);
  }
  template <class T> void take(T*& array, int64_t count) {
    array = start_ ? reinterpret_cast<T*>(start_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
  }

 private:
  Tensor memory_;
  char* start_ = nullptr;
  size_t used_ = 0;
};

inline bool one_run(const BoxSource& source) {
  return source.count <= int64_t(kRun) || source.images * source.count <= kOneRunPairs / source.count;
}

template <class T> struct RunPair { Runs<T> runs[2]; };

// The keys under way, if the order takes more than one launch.
template <class T> void take_runs(Workspace& workspace, const BoxSource& source, RunPair<T>& pair) {
  if (one_run(source)) return;
  for (Runs<T>& runs : pair.runs) {
    workspace.take(runs.by_score, source.images * source.count);
    if (source.classes) workspace.take(runs.by_class, source.images * source.count);
  }
}

template <class T> void take_sorted(Workspace& workspace, const BoxSource& source, Sorted<T>& sorted) {
  const int64_t total = source.images * source.count;
  workspace.take(sorted.boxes, total);
  workspace.take(sorted.order, total);
  workspace.take(sorted.counts, source.images);
  if (!source.classes) return;
  workspace.take(sorted.rank_of, total);
  workspace.take(sorted.index_of, total);
  workspace.take(sorted.classes, total);
}

// Starts the kernels that fill `sorted`, which is taken; source.count > 0.
void sort_boxes(const BoxSource& source, const Sorted<float>& sorted, const RunPair<float>& pair, cudaStream_t stream);
void sort_boxes(const BoxSource& source, const Sorted<double>& sorted, const RunPair<double>& pair,
                cudaStream_t stream);

// Waits for the stream and returns a count that lies on the device: 8 bytes, the only thing that is ever read back.
int64_t read_count(const unsigned long long* count, cudaStream_t stream);

}  // namespace nasdet::cuda
