// Launches the kernels of box_order.cuh: one if counting alone sorts the boxes, else one and a merge for every 64 runs.
#include "box_order.h"

#include <algorithm>

namespace nasdet::cuda {
namespace {

template <class T>
void sort(const BoxSource& source, const Sorted<T>& sorted, const RunPair<T>& pair, cudaStream_t stream) {
  const unsigned blocks = unsigned(source.images * ((source.count + kPiece - 1) / kPiece));
  const uint32_t count = uint32_t(source.count);
  uint32_t run = one_run(source) ? count : kRun;
  order_runs_kernel<T><<<blocks, kSortThreads, 0, stream>>>(source, sorted, pair.runs[0], run);
  check_launch("order_runs_kernel");
  for (int from = 0; run < count; from = 1 - from) {
    const uint32_t fan = std::min(kMaxFan, (count - 1) / run + 1);
    merge_runs_kernel<T><<<dim3(blocks, source.classes ? 2 : 1), kSortThreads, 0, stream>>>(
        source, sorted, pair.runs[from], pair.runs[1 - from], run, fan);
    check_launch("merge_runs_kernel");
    run = run * uint64_t(fan) < count ? run * fan : count;
  }
}

}  // namespace

void sort_boxes(const BoxSource& source, const Sorted<float>& sorted, const RunPair<float>& pair, cudaStream_t stream) {
  sort(source, sorted, pair, stream);
}
void sort_boxes(const BoxSource& source, const Sorted<double>& sorted, const RunPair<double>& pair,
                cudaStream_t stream) {
  sort(source, sorted, pair, stream);
}

int64_t read_count(const unsigned long long* count, cudaStream_t stream) {
  unsigned long long value = 0;
  cudaError_t error = cudaMemcpyAsync(&value, count, sizeof value, cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  STD_TORCH_CHECK(error == cudaSuccess, "nasdet could not read the number of kept boxes: ", cudaGetErrorString(error));
  return int64_t(value);
}

}  // namespace nasdet::cuda
