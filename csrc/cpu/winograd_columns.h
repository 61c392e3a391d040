// The launcher of Winograd's products by columns. Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include "winograd_work.h"

namespace nasdet {
namespace {

// Tasks of some vectors each; `shared`: of one product, whose inputs are made first.
void run_columns(const Work& work, std::vector<WinogradColumns>& tasks, bool shared) {
  constexpr int64_t kTilesAtOnce = 8;
  const auto padded = [](int64_t floats) { return int64_t(Scratch::padded(size_t(floats) * 4) / 4); };
  const WinogradColumns one = tasks.front();
  const int64_t inputs = shared ? padded((one.product.depth + kColumnTerms - 1) / kColumnTerms * one.input_block) : 0;
  int64_t own = 0;
  for (const WinogradColumns& task : tasks)
    own = std::max(own, padded(kWinogradPlanes * (task.product.weight_plane + task.product.wide_plane) +
                               (shared ? 0 : task.input_block)));
  const int64_t workers = std::clamp<int64_t>((scratch_limit() / 4 - inputs) / own, 1, threads());
  Scratch scratch(size_t(inputs + workers * own) * 4);
  float* const given = scratch.take<float>(size_t(inputs));
  float* const memory = scratch.take<float>(size_t(workers * own));
  if (shared) {
    for (WinogradColumns& task : tasks) task.inputs = given;
    for_tasks((one.tiles + kTilesAtOnce - 1) / kTilesAtOnce, workers, [&](int64_t, int64_t task) {
      const int64_t first = task * kTilesAtOnce;
      work.kernels.column_inputs(tasks.front(), first, std::min(kTilesAtOnce, one.tiles - first));
    });
  }
  for_tasks(int64_t(tasks.size()), workers,
            [&](int64_t worker, int64_t task) { work.kernels.columns(tasks[size_t(task)], memory + worker * own); });
}

// The vectors of a product in `parts`, for all of its tiles.
void add_columns(std::vector<WinogradColumns>& to, const Work& work, const WinogradProduct& whole, int64_t tiles,
                 int64_t parts) {
  const int64_t vectors = whole.wide.count, plane = plane_floats(tiles * kColumnTerms);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = vectors * part / parts;
    WinogradProduct product = whole;
    product.wide.vectors += first;
    product.wide.count = vectors * (part + 1) / parts - first;
    product.weight_plane = plane_floats(column_weights(work.kernels.lanes));
    product.wide_plane = plane_floats(tiles * product.wide.count * work.kernels.lanes);
    to.push_back({product, tiles, nullptr, plane, kWinogradPlanes * plane});
  }
}

// A dilation's product, run or added to tasks that can be run together. Narrow ones make their inputs for themselves, block by block:
// in a core's cache, with the sums of all outputs. Wide ones share inputs, which go through the outer caches.
void add_or_run_columns(std::vector<WinogradColumns>& tasks, const Work& work, const Dilated& d,
                        WinogradProduct product) {
  constexpr int64_t kNarrow = 64;
  const int64_t lanes = work.kernels.lanes, vectors = product.wide.count;
  const int64_t all = int64_t(d.tiles.size()), goes = (all + d.column_tiles - 1) / d.column_tiles;
  for (int64_t i = 0; i < goes; ++i) {
    const int64_t begin = all * i / goes, tiles = all * (i + 1) / goes - begin;
    const int64_t room = core_cache() / (kWinogradPlanes * 4) - kColumnTerms * tiles - column_weights(lanes);
    const bool narrow = vectors * lanes <= kNarrow && vectors * lanes * tiles <= room;
    product.tiles = d.tiles.data() + begin;
    if (narrow) {
      const int64_t together = product.transposed ? 1 : int64_t(work.dilations.size());
      add_columns(tasks, work, product, tiles, std::min(vectors, (threads() + together - 1) / together));
    } else {
      std::vector<WinogradColumns> columns;
      add_columns(columns, work, product, tiles,
                  std::max((vectors + kColumnVectors - 1) / kColumnVectors, std::min(vectors, threads())));
      run_columns(work, columns, true);
    }
  }
}

}  // namespace
}  // namespace nasdet
