// The launcher of Winograd's products on matrix tiles. Their sums are the same for any cut: a block of terms after the other.
// Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include "winograd_work.h"

namespace nasdet {
namespace {

constexpr int64_t kPartsBytes = 15 << 20;  // of weights that are made once, and then read for each chunk of tiles
constexpr int64_t kChunkTiles = 128;  // of the map; weights for the tiles of one chunk alone are made as they are used
constexpr int64_t kLongTiles = 80;    // where the weights are larger than that they are made again for so many tiles
constexpr int64_t kColumnsAtOnce =
    4;  // of 16: their weights for a block of terms and their sums stay in a core's cache

int64_t blocks_of(int64_t terms) { return (terms + kAmxTerms - 1) / kAmxTerms; }
int64_t column_pairs(int64_t columns) { return (columns + 1) / 2; }
int64_t weight_plane_bytes(int64_t panels, int64_t blocks) {
  return (panels * blocks * kAmxColumnBlock / 4096 + 1) * 4096 + kAmxRowBytes;
}

// The most tiles that fit into `bytes`, each of which takes `tile_bytes`: whole matrix tiles.
int64_t fitting_tiles(int64_t most, int64_t bytes, int64_t tile_bytes) {
  return std::clamp(bytes / tile_bytes / kAmxSide * kAmxSide, kAmxSide, most);
}

// All that does not depend on the cut.
WinogradAmx amx_of(const Work& work, const Dilated& d, const float* from, float* to, bool transposed) {
  WinogradAmx job{};
  job.product = product_of(work, d, from, to, transposed);
  job.tiles = int64_t(d.tiles.size());
  job.blocks = blocks_of(job.product.deep.count * work.kernels.lanes);
  job.columns = amx_tiles(job.product.wide.count * work.kernels.lanes);
  return job;
}

// The weights first, and then chunks of map tiles with all of them.
void run_amx_chunks(const Work& work, WinogradAmx job) {
  job.weight_plane = weight_plane_bytes(column_pairs(job.columns), job.blocks);
  const int64_t weight_bytes = kWinogradPlanes * job.weight_plane;
  const int64_t row = std::max(job.product.deep.count * work.kernels.lanes, job.columns * kAmxSide);
  const int64_t most = fitting_tiles(kChunkTiles, scratch_limit() - weight_bytes, kWinogradPlanes * 4 * row);
  const int64_t rows = amx_tiles(std::min(most, job.tiles));
  job.product.deep_plane = job.product.wide_plane = plane_floats(rows * kAmxSide * row);
  const int64_t chunk_bytes =
      int64_t(Scratch::padded(size_t(rows * job.blocks * kAmxRowBlock + kWinogradPlanes * job.product.deep_plane * 4)));
  const int64_t workers = std::clamp<int64_t>((scratch_limit() - weight_bytes) / chunk_bytes, 1, threads());
  Scratch scratch(Scratch::padded(size_t(weight_bytes)) + size_t(workers * chunk_bytes));
  job.weights = scratch.take<char>(size_t(weight_bytes));
  char* const chunks = scratch.take<char>(size_t(workers * chunk_bytes));
  for_tasks(job.columns * job.blocks, workers, [&](int64_t, int64_t task) {
    const int64_t column = task / job.blocks, block = task % job.blocks;
    winograd_amx_kernels().weights(
        job, column, block,
        job.weights + (column / 2 * job.blocks + block) * kAmxColumnBlock + column % 2 * kAmxTileBytes);
  });
  const int64_t count = chunks_of(job.tiles, most);
  for_tasks(count, workers, [&](int64_t worker, int64_t chunk) {
    const int64_t begin = job.tiles * chunk / count, end = job.tiles * (chunk + 1) / count;
    winograd_amx_kernels().chunk(job, begin, end - begin, chunks + worker * chunk_bytes);
  });
}

// The map tiles of the job first, and then columns of all of them with weights of their own.
void run_amx_columns(const Work& work, WinogradAmx job) {
  const int64_t width = std::min(kColumnsAtOnce, job.columns), rows = amx_tiles(job.tiles);
  job.product.deep_plane = plane_floats(kAmxSide * job.product.deep.count * work.kernels.lanes);
  job.product.wide_plane = plane_floats(rows * column_pairs(width) * kAmxSide * 2 * kAmxSide);
  job.weight_plane = weight_plane_bytes(column_pairs(width), 1);
  const int64_t input_bytes = int64_t(Scratch::padded(size_t(kWinogradPlanes * rows * job.blocks * kAmxRowBlock)));
  const int64_t own = int64_t(Scratch::padded(
      size_t(kWinogradPlanes * std::max(job.product.deep_plane * 4, job.weight_plane + job.product.wide_plane * 4))));
  const int64_t workers = std::clamp<int64_t>((scratch_limit() - input_bytes) / own, 1, threads());
  Scratch scratch(size_t(input_bytes + workers * own));
  job.inputs = scratch.take<char>(size_t(input_bytes));
  char* const pieces = scratch.take<char>(size_t(workers * own));
  for_tasks(rows, workers,
            [&](int64_t worker, int64_t index) { winograd_amx_kernels().inputs(job, index, pieces + worker * own); });
  for_tasks((job.columns + width - 1) / width, workers, [&](int64_t worker, int64_t task) {
    winograd_amx_kernels().columns(job, task * width, std::min(width, job.columns - task * width),
                                   pieces + worker * own);
  });
}

void run_amx_products(const Work& work, const float* from, float* to, bool transposed) {
  const int64_t limit = scratch_limit();
  for (const Dilated& d : work.dilations) {
    if (!d.on_tiles) continue;
    WinogradAmx job = amx_of(work, d, from, to, transposed);
    const bool large =
        kWinogradPlanes * weight_plane_bytes(column_pairs(job.columns), job.blocks) > std::min(kPartsBytes, limit / 2);
    const int64_t all = job.tiles;
    const int64_t most = fitting_tiles(large ? kLongTiles : kChunkTiles, limit / 2,
                                       kWinogradPlanes * job.blocks * kAmxRowBlock / kAmxSide);
    if (!large && all > most) {
      run_amx_chunks(work, job);
      continue;
    }
    for (int64_t i = 0, count = (all + most - 1) / most; i < count; ++i) {
      const int64_t begin = all * i / count;
      job.product.tiles = d.tiles.data() + begin, job.tiles = all * (i + 1) / count - begin;
      run_amx_columns(work, job);
    }
  }
}

}  // namespace
}  // namespace nasdet
