// The launcher of Winograd's convolution: cuts a problem into dilations, pieces of the weights that stay in the caches, and
// chunks of tiles, and estimates the time. Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include "winograd_amx_launch.h"
#include "winograd_columns.h"

namespace nasdet {
namespace {

constexpr int64_t kGradientBytes =
    4 << 20;  // of the tiles in the domain between two barriers, for the gradient of the weights

// A product and what it points to.
struct Piece {
  WinogradProduct product;
  std::vector<WinogradPanel> panels;
  int64_t tiles, chunk, chunk_floats;  // tiles of all chunks, and of each but the last
};

// A piece of each of some dilations, or several where the weights of one would not stay in the caches.
std::vector<Piece> pieces_of(const Work& work, const std::vector<const Dilated*>& dilations, const float* from,
                             float* to, bool transposed) {
  const int64_t lanes = work.kernels.lanes, bytes = std::min(kWeightBytes, scratch_limit() / 2);
  std::vector<Piece> pieces;
  for (const Dilated* d : dilations) {
    const WinogradProduct whole = product_of(work, *d, from, to, transposed);
    const int64_t depth = whole.depth, vectors = whole.wide.count, tiles = int64_t(d->tiles.size());
    const int64_t step = piece_vectors(work.kernels, depth, bytes);
    // On 16 registers a panel is narrow: a plane of a chunk is read once for all of them, not once for each.
    const int64_t widest = std::min({lanes == 8 ? step : work.kernels.most_vectors, step, vectors});
    const int64_t chunk = chunk_size(tiles, chunk_tiles(kWinogradPlanes * 4 * lanes * depth * std::min(step, vectors)));
    for (int64_t first = 0; first < vectors; first += step) {
      WinogradProduct product = whole;
      product.wide.vectors += first;
      product.wide.count = std::min(step, vectors - first);
      product.weight_plane = plane_floats(depth * product.wide.count * lanes);
      product.deep_plane = plane_floats(chunk * product.deep.count * lanes);
      product.wide_plane = plane_floats(chunk * widest * lanes);
      product.panels_of_go = (widest + work.kernels.most_vectors - 1) / work.kernels.most_vectors;
      pieces.push_back({product, panels_of(product.wide.count, work.kernels.most_vectors), tiles, chunk,
                        kWinogradPlanes * (product.deep_plane + product.wide_plane)});
    }
  }
  return pieces;
}

// Tiles [begin, end) of a piece.
struct Chunk {
  const Piece* piece;
  int64_t begin, end;
};

// The chunks of some pieces; `down_the_map`: what one dilation reads of the map is still near when the next one does. On AVX-512 that
// brought nothing.
std::vector<Chunk> chunks_in_order(const Piece* pieces, const Piece* end, bool down_the_map) {
  std::vector<Chunk> chunks;
  for (const Piece* piece = pieces; piece < end; ++piece)
    for (int64_t begin = 0; begin < piece->tiles; begin += piece->chunk)
      chunks.push_back({piece, begin, std::min(begin + piece->chunk, piece->tiles)});
  const auto place = [](const Chunk& chunk) {
    const WinogradTile& tile = chunk.piece->product.tiles[chunk.begin];
    return std::pair(tile.image, tile.row);
  };
  if (down_the_map)
    std::stable_sort(chunks.begin(), chunks.end(), [&](const Chunk& a, const Chunk& b) { return place(a) < place(b); });
  return chunks;
}

// Pieces [first, last) share a round: their weights are transformed together, and then all of their tiles; one after the
// other where they add to the same map.
void run_round(std::vector<Piece>& pieces, size_t first, size_t last, const WinogradKernels& kernels, float* weights,
               float* chunks, int64_t chunk_floats, int64_t workers) {
  std::vector<int64_t> weight_tasks{0};
  for (size_t i = first; i < last; ++i) {
    WinogradProduct& p = pieces[i].product;
    p.panels = pieces[i].panels.data(), p.panel_count = int64_t(pieces[i].panels.size());
    p.weights = weights, weights += kWinogradPlanes * p.weight_plane;
    weight_tasks.push_back(weight_tasks.back() + p.wide.count * p.deep.count);
  }
  constexpr int64_t kWeightTasks = 16;
  for_tasks((weight_tasks.back() + kWeightTasks - 1) / kWeightTasks, workers, [&](int64_t, int64_t block) {
    for (int64_t task = block * kWeightTasks; task < std::min(weight_tasks.back(), (block + 1) * kWeightTasks);
         ++task) {
      const auto end = std::upper_bound(weight_tasks.begin(), weight_tasks.end(), task);
      kernels.weights(pieces[first + size_t(end - weight_tasks.begin()) - 1].product, task - end[-1],
                      task - end[-1] + 1);
    }
  });
  for (size_t next = first; first < last; first = next) {
    do ++next;
    while (next < last && !pieces[next].product.transposed);
    const std::vector<Chunk> tasks = chunks_in_order(pieces.data() + first, pieces.data() + next, kernels.lanes == 8);
    for_tasks(int64_t(tasks.size()), workers, [&](int64_t worker, int64_t task) {
      const Chunk& chunk = tasks[size_t(task)];
      kernels.tiles(chunk.piece->product, chunk.begin, chunk.end - chunk.begin, chunks + worker * chunk_floats);
    });
  }
}

void run_pieces(const Work& work, std::vector<Piece> pieces) {
  std::vector<size_t> rounds{0};
  int64_t floats = 0, most_floats = 0, chunk_floats = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int64_t more = kWinogradPlanes * pieces[i].product.weight_plane;
    if (i > 0 && (floats + more) * 4 > std::min(kWeightBytes, scratch_limit() / 2)) rounds.push_back(i), floats = 0;
    floats += more;
    most_floats = std::max(most_floats, floats);
    chunk_floats = std::max(chunk_floats, int64_t(Scratch::padded(size_t(pieces[i].chunk_floats) * 4) / 4));
  }
  rounds.push_back(pieces.size());
  const int64_t fit = (scratch_limit() - most_floats * 4) / (chunk_floats * 4);
  const int64_t workers = std::max<int64_t>(1, std::min(fit, threads()));
  Scratch scratch(Scratch::padded(size_t(most_floats) * 4) + Scratch::padded(size_t(workers * chunk_floats) * 4));
  float* const weights = scratch.take<float>(size_t(most_floats));
  float* const chunks = scratch.take<float>(size_t(workers * chunk_floats));
  for (size_t r = 0; r + 1 < rounds.size(); ++r)
    run_round(pieces, rounds[r], rounds[r + 1], work.kernels, weights, chunks, chunk_floats, workers);
}

// The gradient of x adds up in the order of the dilations, whichever way each of them goes.
void run_products(const Work& work, const float* from, float* to, bool transposed) {
  run_amx_products(work, from, to, transposed);
  std::vector<const Dilated*> waiting;
  std::vector<WinogradColumns> columns;
  const auto run_waiting = [&] {
    if (!waiting.empty()) run_pieces(work, pieces_of(work, waiting, from, to, transposed));
    if (!columns.empty()) run_columns(work, columns, false);
    waiting.clear(), columns.clear();
  };
  for (const Dilated& d : work.dilations) {
    if (d.on_tiles) continue;
    if (transposed && (d.column_tiles != 0 || !columns.empty())) run_waiting();
    if (d.column_tiles == 0) waiting.push_back(&d);
    else add_or_run_columns(columns, work, d, product_of(work, d, from, to, transposed));
  }
  run_waiting();
}

// A part of the gradient of the weights: vectors of inputs and of outputs.
struct GradientPart { int64_t first_in, ins, first_out, outs; };

// Parts for the threads. A part transforms all tiles of its channels on its own, for tiles in the domain that another core has
// written take longer to fetch than to make. Outputs alone are divided where sums go over all inputs.
std::vector<GradientPart> gradient_parts(int64_t inputs, int64_t first, int64_t count, bool all_inputs) {
  int64_t in_parts = 1, out_parts = 1;
  while (in_parts * out_parts < threads()) {
    const bool divide_inputs = !all_inputs && inputs / in_parts >= count / out_parts && 2 * in_parts <= inputs;
    if (!divide_inputs && 2 * out_parts > count) break;
    (divide_inputs ? in_parts : out_parts) *= 2;
  }
  std::vector<GradientPart> parts;
  for (int64_t i = 0; i < in_parts; ++i)
    for (int64_t o = 0; o < out_parts; ++o) {
      const int64_t in = inputs * i / in_parts, out = count * o / out_parts;
      parts.push_back({in, inputs * (i + 1) / in_parts - in, first + out, count * (o + 1) / out_parts - out});
    }
  return parts;
}

// Inputs and outputs whose sums over few tiles are collected while they are in a core's cache.
constexpr int64_t kBlockIns = 64, kBlockOuts = 64;

// Whether all sums would go through the outer caches for few tiles. The mixture's gradient sums over all inputs.
bool gradient_blocks_pay(const Work& work, const Dilated& d) {
  constexpr int64_t kPlanes = kWinogradPlanes * 4, kMostTiles = 32;
  const int64_t tiles = int64_t(d.tiles.size()), outs = int64_t(d.channels.size()) * work.kernels.lanes;
  return !d.on_tiles && !mixture_wanted(d) && tiles <= kMostTiles &&
         kPlanes * work.p.in_channels * outs > core_cache() &&
         kPlanes * (tiles + 1) * (work.p.in_channels + outs + 64) <= scratch_limit() / 2;
}

// Sums on matrix tiles are in panels of two tiles, the last one too.
constexpr int64_t kTileColumns = 2 * kAmxSide;

// The largest pieces of scratch of any part, in floats.
struct GradientScratch {
  size_t x = 0, y = 0, sums = 0, parts = 0;  // parts: bytes
  size_t bytes() const {
    return Scratch::padded(x * 4) + Scratch::padded(y * 4) + Scratch::padded(sums * 4) + Scratch::padded(parts);
  }
};

WinogradGradient gradient_of(const Work& work, const Dilated& d, const GradientPart& part, int64_t step, const float* x,
                             const float* grad, const std::vector<WinogradPanel>& panels) {
  const ConvProblem& p = work.p;
  const int64_t lanes = work.kernels.lanes;
  const int64_t first = part.first_in * lanes;
  const int64_t ins = std::min(p.in_channels - first, part.ins * lanes);
  const int64_t x_row = row_floats(part.ins * lanes), y_row = row_floats(part.outs * lanes);
  const int64_t rows = d.on_tiles ? amx_tiles(ins) * kAmxSide : ins;
  const int64_t outs = part.outs * lanes;
  const int64_t columns = d.on_tiles ? (outs + kTileColumns - 1) / kTileColumns * kTileColumns : outs;
  return {p.height,
          p.width,
          d.h,
          d.w,
          d.on_tiles,
          nullptr,
          0,
          {x, p.in_channels, work.inputs.data() + part.first_in, part.ins},
          {grad, p.out_channels, d.channels.data() + part.first_out, part.outs},
          p.in_channels,
          first,
          ins,
          rows,
          false,
          panels.data(),
          int64_t(panels.size()),
          nullptr,
          nullptr,
          x_row,
          y_row,
          nullptr,
          plane_floats(step * x_row),
          plane_floats(step * y_row),
          plane_floats(rows * columns)};
}

std::vector<WinogradPanel> gradient_panels(const Work& work, bool on_tiles, int64_t vectors) {
  if (!on_tiles) return panels_of(vectors, work.kernels.most_vectors);
  const int64_t width = kTileColumns / work.kernels.lanes;
  std::vector<WinogradPanel> panels;
  for (int64_t first = 0; first < vectors; first += width) panels.push_back({first, width});
  return panels;
}

// How many tiles are summed up at a time, of which each takes `tile_bytes`: whole blocks for matrix tiles, whose sums are then the same
// for any number. Few where sums as small as these stay in a core's cache, for the tiles then stay there too.
int64_t gradient_step(bool on_tiles, int64_t tiles, int64_t tile_bytes, int64_t sum_bytes, int64_t limit) {
  const int64_t unit = on_tiles ? kAmxTerms : 1;
  const int64_t least = on_tiles ? kAmxTerms : 8;
  const int64_t most = !on_tiles && sum_bytes <= core_cache() / 3 ? core_cache() * 3 / 8 : kGradientBytes;
  const int64_t fit = std::max(std::min(most, limit) / tile_bytes / unit * unit, least);
  const int64_t steps = (tiles + fit - 1) / fit;
  return ((tiles + steps - 1) / steps + unit - 1) / unit * unit;
}

// For `step` tiles at a time.
GradientScratch gradient_scratch(const Work& work, const Dilated& d, const std::vector<GradientPart>& parts,
                                 int64_t step, bool blocks) {
  GradientScratch most;
  for (const GradientPart& part : parts) {
    const WinogradGradient g = gradient_of(work, d, part, step, nullptr, nullptr, {});
    most.x = std::max(most.x, size_t(kWinogradPlanes * g.x_plane));
    most.y = std::max(most.y, size_t(kWinogradPlanes * g.y_plane));
    most.sums =
        std::max(most.sums, size_t(kWinogradPlanes * (blocks ? plane_floats(kBlockIns * kBlockOuts) : g.sum_plane)));
    if (d.on_tiles)
      most.parts = std::max(most.parts,
                            size_t((step + kAmxTerms - 1) / kAmxTerms *
                                   (amx_tiles(g.ins) + amx_tiles(g.y.count * work.kernels.lanes) + 1) * kAmxRowBlock));
  }
  return most;
}

// The sums over a part's tiles, all of which are in the domain, block by block.
void collect_blocks(const Work& work, const WinogradGradient& part) {
  const int64_t step = kBlockOuts / work.kernels.lanes;
  for (int64_t out = 0; out < part.y.count; out += step) {
    const std::vector<WinogradPanel> panels = panels_of(std::min(step, part.y.count - out), work.kernels.most_vectors);
    for (int64_t in = 0; in < part.ins; in += kBlockIns) {
      WinogradGradient block = part;
      block.first_in += in, block.ins = block.sum_rows = std::min(kBlockIns, part.ins - in);
      block.x_tiles += in, block.y_tiles += out * work.kernels.lanes;
      block.y.vectors += out, block.y.count = std::min(step, part.y.count - out);
      block.panels = panels.data(), block.panel_count = int64_t(panels.size());
      block.sum_plane = plane_floats(kBlockIns * kBlockOuts);
      work.kernels.gradient_planes(block);
      work.kernels.gradient_collect(block, 0, block.y.count);
    }
  }
}

// The gradient of the weights of some of the channels of one dilation, `step` tiles at a time, or fewer if padding wants room;
// `blocks`: all of them.
void run_gradient(const Work& work, const Dilated& d, int64_t first, int64_t count, int64_t step, bool blocks,
                  const float* x, const float* grad) {
  const std::vector<GradientPart> parts = gradient_parts(int64_t(work.inputs.size()), first, count, mixture_wanted(d));
  const int64_t tiles = int64_t(d.tiles.size()), part_count = int64_t(parts.size());
  const int64_t unit = d.on_tiles ? kAmxTerms : 1;
  GradientScratch most = gradient_scratch(work, d, parts, step, blocks);
  while (step > unit && !blocks && int64_t(most.bytes()) > scratch_limit())
    most = gradient_scratch(work, d, parts, step -= unit, blocks);
  const int64_t workers =
      std::clamp<int64_t>(scratch_limit() / int64_t(most.bytes()), 1, std::min(threads(), part_count));
  Scratch scratch(most.bytes() * size_t(workers));
  char* const memory = scratch.take<char>(most.bytes() * size_t(workers));
  for_tasks(part_count, workers, [&](int64_t worker, int64_t i) {
    const GradientPart& part = parts[size_t(i)];
    const std::vector<WinogradPanel> panels = gradient_panels(work, d.on_tiles, part.outs);
    WinogradGradient g = gradient_of(work, d, part, step, x, grad, panels);
    char* const own = memory + size_t(worker) * most.bytes();
    g.x_tiles = reinterpret_cast<float*>(own), g.y_tiles = reinterpret_cast<float*>(own + Scratch::padded(most.x * 4));
    g.sums = reinterpret_cast<float*>(own + Scratch::padded(most.x * 4) + Scratch::padded(most.y * 4));
    char* const pieces = reinterpret_cast<char*>(g.sums) + Scratch::padded(most.sums * 4);
    for (int64_t begin = 0; begin < tiles; begin += step) {
      g.tiles = d.tiles.data() + begin, g.tile_count = std::min(step, tiles - begin), g.accumulate = begin > 0;
      work.kernels.gradient_tiles(g);
      if (blocks) return collect_blocks(work, g);
      if (!d.on_tiles) work.kernels.gradient_planes(g);
      else
        for (int64_t plane = 0; plane < kWinogradPlanes; ++plane) winograd_amx_kernels().gradient(g, plane, pieces);
    }
    work.kernels.gradient_collect(g, 0, part.outs);
  });
}

void run_gradients(const Work& work, const float* x, const float* grad) {
  const int64_t limit = scratch_limit(), lanes = work.kernels.lanes, inputs = int64_t(work.inputs.size());
  for (const Dilated& d : work.dilations) {
    if (!weights_wanted(d)) continue;
    const int64_t vectors = int64_t(d.channels.size()), tiles = int64_t(d.tiles.size());
    if (gradient_blocks_pay(work, d)) {
      run_gradient(work, d, 0, vectors, tiles, true, x, grad);
      continue;
    }
    const int64_t bytes = std::min(d.on_tiles ? 2 * kWeightBytes : kWeightBytes, limit / 2);
    int64_t piece = piece_vectors(work.kernels, work.p.in_channels, bytes);
    if (d.on_tiles) piece = std::max<int64_t>(piece * lanes / kTileColumns, 1) * kTileColumns / lanes;
    piece = std::min(piece, vectors);
    const int64_t plane = 4 * kWinogradPlanes * lanes;
    const int64_t step =
        gradient_step(d.on_tiles, tiles, plane * (inputs + piece), plane * work.p.in_channels * piece, limit / 2);
    for (int64_t first = 0; first < vectors; first += piece)
      run_gradient(work, d, first, std::min(piece, vectors - first), step, false, x, grad);
  }
}

const char* winograd_why_not(const ConvProblem& p) {
  if (winograd_kernels() == nullptr) return "it needs AVX2";
  if (p.storage != 0) return "it computes in float32 only";
  if (p.kernel != 3) return "the kernel is not 3x3";
  if (p.stride_h != 1 || p.stride_w != 1) return "the stride is not 1";
  if (p.groups != 1) return "it has no convolution groups";
  std::vector<std::pair<int64_t, int64_t>> slices;
  for (const ConvBranch& b : p.branches) slices.emplace_back(b.first, b.last);
  std::sort(slices.begin(), slices.end());
  int64_t end = 0;
  for (const auto& [first, last] : slices) {
    if (first != end) return "its channels must have one dilation each";
    end = last;
  }
  return end == p.out_channels ? nullptr : "its channels must have one dilation each";
}

double winograd_seconds(const ConvProblem& p, bool backward) {
  const int64_t lanes = winograd_kernels()->lanes;
  double seconds = 0;
  for (const Dilated& d : dilations_of(p, lanes)) {
    const WinogradRates& rates = d.on_tiles ? kWinogradAmx : lanes == 16 ? kWinogradAvx512 : kWinogradAvx2;
    seconds += winograd_dilation_seconds(p, rates, winograd_tile_count(p, d.h, d.w), int64_t(d.channels.size()), lanes,
                                         backward, weights_wanted(d));
  }
  return seconds;
}

void winograd_forward(const ConvProblem& p, const void* x, void* y) {
  run_products(work_of(p), static_cast<const float*>(x), static_cast<float*>(y), false);
}

void winograd_backward(const ConvProblem& p, const void* x, const void* grad, void* dx) {
  const Work work = work_of(p);
  if (dx) run_products(work, static_cast<const float*>(grad), static_cast<float*>(dx), true);
  run_gradients(work, static_cast<const float*>(x), static_cast<const float*>(grad));
}

}  // namespace

const ConvAlgorithm kWinogradConv = {"winograd", winograd_why_not, winograd_seconds, winograd_forward,
                                     winograd_backward};

}  // namespace nasdet
