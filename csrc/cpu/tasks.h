// Work shared out piece by piece: a thread that is done takes the next, and so waits for no other whose pieces were dearer
// or whose core was busy. Nothing may depend on who takes which.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace nasdet {
namespace {

inline int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// All tasks, each by one of at most `workers` threads: body(worker, task).
template <class Body> void for_tasks(int64_t tasks, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(tasks, workers), 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) body(worker, task);
  });
}

// [0, count) in ranges, several for each of at most `workers` threads: body(worker, begin, end).
template <class Body> void for_ranges(int64_t count, int64_t workers, const Body& body) {
  constexpr int64_t kRanges = 8;  // for each worker
  const int64_t ranges = std::min(count, workers > 1 ? kRanges * workers : 1);
  for_tasks(ranges, workers,
            [&](int64_t worker, int64_t i) { body(worker, count * i / ranges, count * (i + 1) / ranges); });
}

}  // namespace
}  // namespace nasdet
