// The launcher of Winograd's products on matrix tiles. Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include "winograd_work.h"

namespace nasdet {
namespace {

constexpr int64_t kChunkTiles = 128;      // of the map: weights are read once for each chunk
constexpr int64_t kColumnTiles = 160;     // map tiles that are worth weights of their own
constexpr int64_t kColumnsAtOnce = 4;     // of 16: their weights and sums stay in the cache of a core
constexpr int64_t kPartsBytes = 15 << 20;  // of a piece's weights in parts, as kWeightBytes

// `count` vectors of `wide` from `first` on, all map tiles: the weights first, and then chunks of tiles.
void run_amx_piece(const Work& work, const Dilated& d, WinogradProduct product) {
  const int64_t lanes = work.kernels.lanes, deep = product.deep.count * lanes, wide = amx_tiles(product.wide.count * lanes) * kAmxSide;
  const int64_t blocks = (deep + kAmxTerms - 1) / kAmxTerms, columns = wide / kAmxSide, panels = (columns + 1) / 2, tiles = int64_t(d.tiles.size());
  const int64_t most = kChunkTiles, rows = amx_tiles(std::min(most, tiles)) * kAmxSide;
  const int64_t deep_row = row_floats(deep), wide_row = row_floats(wide);
  product.deep_plane = product.wide_plane = plane_floats(rows * std::max(deep_row, wide_row));
  WinogradAmx job{product, tiles, blocks, blocks, nullptr, (panels * blocks * kAmxColumnBlock / 4096 + 1) * 4096 + 64, deep_row, wide_row, nullptr};
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

// Map tiles [begin, end) with weights that are made for them alone.
void run_amx_columns(const Work& work, const Dilated& d, const float* from, float* to, bool transposed, int64_t begin, int64_t end) {
  const int64_t lanes = work.kernels.lanes;
  const ConvProblem& p = work.p;
  const std::vector<WinogradChannels>&from_channels = transposed ? d.channels : work.inputs, &to_channels = transposed ? work.inputs : d.channels;
  const int64_t deep = int64_t(from_channels.size()) * lanes, blocks = (deep + kAmxTerms - 1) / kAmxTerms, columns = amx_tiles(int64_t(to_channels.size()) * lanes);
  const int64_t slab = 1, width = std::min<int64_t>(kColumnsAtOnce, columns), tiles = end - begin, rows = amx_tiles(tiles);
  const WinogradSide in{from, transposed ? p.out_channels : p.in_channels, from_channels.data(), int64_t(from_channels.size())};
  const WinogradSide out{nullptr, transposed ? p.in_channels : p.out_channels, to_channels.data(), int64_t(to_channels.size())};
  const WinogradProduct product{p.height, p.width, d.h, d.w, d.tiles.data() + begin, in, out, to, p.in_channels, rows_of(from_channels, lanes), transposed,
                                transposed && &d != work.dilations.data(), nullptr, 0, nullptr, 0, plane_floats(kAmxSide * deep), plane_floats(rows * kAmxSide * (width + 1) / 2 * 2 * kAmxSide)};
  WinogradAmx job{product, tiles, blocks, slab, nullptr, ((width + 1) / 2 * slab * kAmxColumnBlock / 4096 + 1) * 4096 + 64, 0, 0, nullptr};
  const int64_t input_bytes = kWinogradPlanes * rows * blocks * kAmxRowBlock;
  const int64_t own = int64_t(Scratch::padded(size_t(kWinogradPlanes * std::max(product.deep_plane * 4, job.weight_plane + product.wide_plane * 4))));
  const int64_t workers = std::clamp<int64_t>((scratch_limit() - input_bytes) / own, 1, threads());
  Scratch memory(Scratch::padded(size_t(input_bytes)) + size_t(workers * own));
  job.inputs = memory.take<char>(size_t(input_bytes));
  char* const scratch = memory.take<char>(size_t(workers * own));
  for_tasks(rows, workers, [&](int64_t worker, int64_t index) { work.kernels.amx_inputs(job, index, scratch + worker * own); });
  const int64_t panels = (columns + width - 1) / width;
  for_tasks(panels, workers, [&](int64_t worker, int64_t panel) {
    work.kernels.amx_columns(job, panel * width, std::min(width, columns - panel * width), scratch + worker * own);
  });
}

void run_amx_products(const Work& work, const float* from, float* to, bool transposed) {
  const ConvProblem& p = work.p;
  const int64_t lanes = work.kernels.lanes;
  for (const Dilated& d : work.dilations) {
    const std::vector<WinogradChannels>&deep = transposed ? d.channels : work.inputs, &wide = transposed ? work.inputs : d.channels;
    const int64_t vectors = int64_t(wide.size()), panel = 2 * kAmxSide / lanes, blocks = (int64_t(deep.size()) * lanes + kAmxTerms - 1) / kAmxTerms;
    const int64_t step = std::max<int64_t>(1, std::min(kPartsBytes, scratch_limit() / 2) / (kWinogradPlanes * blocks * kAmxColumnBlock)) * panel;
    const int64_t chunks = (int64_t(d.tiles.size()) + kColumnTiles - 1) / kColumnTiles;
    if (chunks == 1 || step < vectors) {
      for (int64_t i = 0; i < chunks; ++i) run_amx_columns(work, d, from, to, transposed, int64_t(d.tiles.size()) * i / chunks, int64_t(d.tiles.size()) * (i + 1) / chunks);
      continue;
    }
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
