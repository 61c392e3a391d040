// The launcher of Winograd's products on matrix tiles. Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include "winograd_work.h"

namespace nasdet {
namespace {

constexpr int64_t kPartsBytes = 15 << 20;  // of a piece's weights in parts, as kWeightBytes

// Map tiles of a chunk: what leaves the core's cache room for the weights that pass by, in whole pairs of matrix tiles.
int64_t amx_chunk_tiles(int64_t floats) {
  constexpr int64_t kMost = 4 * kAmxTerms;
  return std::clamp<int64_t>(core_cache() * 5 / 8 / (kWinogradPlanes * 4 * floats) / kAmxTerms * kAmxTerms, kAmxTerms, kMost);
}

// `count` vectors of `wide` from `first` on, all map tiles: the weights first, and then chunks of tiles.
void run_amx_piece(const Work& work, const Dilated& d, WinogradProduct product) {
  const int64_t lanes = work.kernels.lanes, deep = product.deep.count * lanes, wide = amx_tiles(product.wide.count * lanes) * kAmxSide;
  const int64_t blocks = (deep + kAmxTerms - 1) / kAmxTerms, columns = wide / kAmxSide, panels = (columns + 1) / 2, tiles = int64_t(d.tiles.size());
  const int64_t most = amx_chunk_tiles(std::max(deep, wide)), rows = amx_tiles(std::min(most, tiles)) * kAmxSide;
  product.deep_plane = product.wide_plane = plane_floats(rows * std::max(deep, wide));
  WinogradAmx job{product, blocks, nullptr, (panels * blocks * kAmxColumnBlock / 4096 + 1) * 4096 + 64};
  const int64_t weight_bytes = kWinogradPlanes * job.weight_plane;
  const int64_t chunk_bytes = int64_t(Scratch::padded(size_t(rows / kAmxSide * blocks * kAmxRowBlock + kWinogradPlanes * product.deep_plane * 4)));
  const int64_t workers = std::clamp<int64_t>((scratch_limit() - weight_bytes) / chunk_bytes, 1, threads());
  Scratch memory(Scratch::padded(size_t(weight_bytes)) + size_t(workers * chunk_bytes));
  job.weights = memory.take<char>(size_t(weight_bytes));
  char* const chunks = memory.take<char>(size_t(workers * chunk_bytes));
  for_tasks(columns * blocks, workers, [&](int64_t, int64_t task) {
    const int64_t column = task / blocks, block = task % blocks;
    work.kernels.amx_weights(job, column, block, job.weights + (column / 2 * blocks + block) * kAmxColumnBlock + column % 2 * kAmxTileBytes);
  });
  const int64_t count = chunks_of(tiles, most);
  for_tasks(count, workers, [&](int64_t worker, int64_t chunk) {
    const int64_t begin = tiles * chunk / count, end = tiles * (chunk + 1) / count;
    work.kernels.amx_chunk(job, begin, end - begin, chunks + worker * chunk_bytes);
  });
}

void run_amx_products(const Work& work, const float* from, float* to, bool transposed) {
  const ConvProblem& p = work.p;
  const int64_t lanes = work.kernels.lanes;
  for (const Dilated& d : work.dilations) {
    const std::vector<WinogradChannels>&deep = transposed ? d.channels : work.inputs, &wide = transposed ? work.inputs : d.channels;
    const int64_t vectors = int64_t(wide.size()), panel = 2 * kAmxSide / lanes, blocks = (int64_t(deep.size()) * lanes + kAmxTerms - 1) / kAmxTerms;
    const int64_t step = std::max<int64_t>(1, std::min(kPartsBytes, scratch_limit() / 2) / (kWinogradPlanes * blocks * kAmxColumnBlock)) * panel;
    const WinogradSide in{from, transposed ? p.out_channels : p.in_channels, deep.data(), int64_t(deep.size())};
    for (int64_t first = 0; first < vectors; first += step) {
      const WinogradSide out{nullptr, transposed ? p.in_channels : p.out_channels, wide.data() + first, std::min(step, vectors - first)};
      const WinogradProduct product{p.height, p.width, d.h, d.w, d.tiles.data(), in, out, to, p.in_channels, rows_of(deep, lanes), transposed,
                                    transposed && &d != work.dilations.data(), nullptr, 0, nullptr, 0, 0, 0};
      run_amx_piece(work, d, product);
    }
  }
}

}  // namespace
}  // namespace nasdet
