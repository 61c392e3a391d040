// The launcher of Winograd's convolution: cuts a problem into dilations, pieces of the weights that stay in the caches, and
// chunks of tiles, and estimates the time. Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include <vector>

#include "caches.h"
#include "conv.h"
#include "scratch.h"
#include "tasks.h"
#include "winograd_cost.h"

namespace nasdet {
namespace {

constexpr int64_t kWeightBytes = 10 << 20;    // of a piece's weights in the domain: read for each chunk of tiles
constexpr int64_t kTilesPerMiB = 12;         // of a core's cache: a chunk of tiles in the domain, which a panel's outputs and weights pass by
constexpr int64_t kGradientBytes = 4 << 20;  // of the tiles in the domain between two barriers, for the gradient of the weights

struct WinogradKernels {
  decltype(&avx2::winograd_weights) weights;
  decltype(&avx2::winograd_tiles) tiles;
  decltype(&avx2::winograd_gradient_tiles) gradient_tiles;
  decltype(&avx2::winograd_gradient_planes) gradient_planes;
  decltype(&avx2::winograd_gradient_collect) gradient_collect;
  int64_t lanes, most_vectors;
};

const WinogradKernels* winograd_kernels() {
#ifdef NASDET_X86
#define NASDET_WINOGRAD(isa, ...) {isa::winograd_weights, isa::winograd_tiles, isa::winograd_gradient_tiles, isa::winograd_gradient_planes, isa::winograd_gradient_collect, __VA_ARGS__}
  static constexpr WinogradKernels kAvx2 = NASDET_WINOGRAD(avx2, 8, 2), kAvx512 = NASDET_WINOGRAD(avx512, 16, 4);
#undef NASDET_WINOGRAD
  if (cpu_capability() >= Isa::avx512) return &kAvx512;
  if (cpu_capability() == Isa::avx2) return &kAvx2;
#endif
  return nullptr;
}

// The slices of one dilation.
struct Dilated {
  int64_t h, w;
  std::vector<WinogradChannels> channels;
  std::vector<WinogradTile> tiles;
};

struct Work {
  const ConvProblem& p;
  const WinogradKernels& kernels;
  std::vector<WinogradChannels> inputs;
  std::vector<Dilated> dilations;
};

void add_channels(std::vector<WinogradChannels>& to, int64_t first, int64_t last, int64_t lanes) {
  for (int64_t c = first; c < last; c += lanes) to.push_back({c, std::min(lanes, last - c), nullptr, nullptr, nullptr, nullptr});
}

void add_branch(std::vector<WinogradChannels>& to, const ConvBranch& b, int64_t row, int64_t lanes) {
  size_t i = to.size();
  add_channels(to, b.first, b.last, lanes);
  for (int64_t at = 0; i < to.size(); ++i, at += lanes) {
    to[i].weight = static_cast<const float*>(b.weight) + at * row;
    if (b.mix) to[i].mix = static_cast<const float*>(b.mix) + at;
    if (b.weight_grad) to[i].weight_grad = static_cast<float*>(b.weight_grad) + at * row;
    if (b.mix_grad) to[i].mix_grad = static_cast<float*>(b.mix_grad) + at;
  }
}

// Pixels a dilation apart form an image of their own, which is cut into tiles; rows and columns of it from the top left.
void add_tiles(Dilated& d, const ConvProblem& p) {
  d.tiles.reserve(size_t(p.images * winograd_axis_tiles(p.height, d.h) * winograd_axis_tiles(p.width, d.w)));
  for (int64_t n = 0; n < p.images; ++n)
    for (int64_t phase_h = 0; phase_h < d.h; ++phase_h)
      for (int64_t row = phase_h; row < p.height; row += 4 * d.h)
        for (int64_t phase_w = 0; phase_w < d.w; ++phase_w)
          for (int64_t column = phase_w; column < p.width; column += 4 * d.w) d.tiles.push_back({int32_t(n), int32_t(row), int32_t(column)});
}

std::vector<Dilated> dilations_of(const ConvProblem& p, int64_t lanes) {
  std::vector<Dilated> dilations;
  for (const ConvBranch& b : p.branches) {
    const int64_t h = std::min<int64_t>(b.dilation_h, p.height), w = std::min<int64_t>(b.dilation_w, p.width);  // beyond the map all are alike
    auto at = std::find_if(dilations.begin(), dilations.end(), [&](const Dilated& d) { return d.h == h && d.w == w; });
    if (at == dilations.end()) at = dilations.insert(at, {h, w, {}, {}});
    add_branch(at->channels, b, p.in_channels * 9, lanes);
  }
  return dilations;
}

bool weights_wanted(const Dilated& d) {
  return std::any_of(d.channels.begin(), d.channels.end(), [](const WinogradChannels& c) { return c.weight_grad || c.mix_grad; });
}

Work work_of(const ConvProblem& p) {
  const WinogradKernels& kernels = *winograd_kernels();
  Work work{p, kernels, {}, dilations_of(p, kernels.lanes)};
  add_channels(work.inputs, 0, p.in_channels, kernels.lanes);
  for (Dilated& d : work.dilations) add_tiles(d, p);
  return work;
}

int64_t plane_floats(int64_t floats) { return (floats + 1023) / 1024 * 1024 + 16; }  // planes a power of 2 apart share cache sets

// Floats of a row that is read down its columns: an odd number of cache lines.
int64_t row_floats(int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

int64_t rows_of(const std::vector<WinogradChannels>& channels, int64_t lanes) { return int64_t(channels.size() - 1) * lanes + channels.back().count; }

// `vectors` in panels of about equal width.
std::vector<WinogradPanel> panels_of(int64_t vectors, int64_t most) {
  std::vector<WinogradPanel> panels;
  const int64_t count = (vectors + most - 1) / most;
  for (int64_t i = 0; i < count; ++i) panels.push_back({vectors * i / count, vectors * (i + 1) / count - vectors * i / count});
  return panels;
}

// How many vectors of weights with `depth` rows a piece takes: whole panels if a few of them fit.
int64_t piece_vectors(const WinogradKernels& k, int64_t depth, int64_t bytes) {
  const int64_t fit = std::max<int64_t>(1, bytes / (kWinogradPlanes * 4 * k.lanes * depth));
  return fit > k.most_vectors ? fit / k.most_vectors * k.most_vectors : fit;
}

// Tiles of a chunk: as many as the core's cache takes, half as many where all weights stay there too.
int64_t chunk_tiles(int64_t weight_bytes) {
  const int64_t tiles = std::max<int64_t>(kTilesPerMiB * core_cache() >> 20, 6);
  return weight_bytes <= core_cache() ? (tiles + 1) / 2 : tiles;
}

// How many chunks of about equal size: as many for each thread, if they are worth it.
int64_t chunks_of(int64_t tiles, int64_t most) {
  const int64_t chunks = (tiles + most - 1) / most, even = (chunks + threads() - 1) / threads() * threads();
  return even * 6 <= tiles ? even : chunks;
}

// A product and what it points to.
struct Piece {
  WinogradProduct product;
  std::vector<WinogradPanel> panels;
  int64_t tiles, chunks, chunk_floats;
};

// A piece of each dilation, or several where the weights of one would not stay in the caches.
std::vector<Piece> pieces_of(const Work& work, const float* from, float* to, bool transposed) {
  const ConvProblem& p = work.p;
  const int64_t lanes = work.kernels.lanes, bytes = std::min(kWeightBytes, scratch_limit() / 2);
  std::vector<Piece> pieces;
  for (const Dilated& d : work.dilations) {
    const std::vector<WinogradChannels>&deep = transposed ? d.channels : work.inputs, &wide = transposed ? work.inputs : d.channels;
    const int64_t depth = rows_of(deep, lanes), step = piece_vectors(work.kernels, depth, bytes), vectors = int64_t(wide.size()), tiles = int64_t(d.tiles.size());
    const int64_t widest = std::min({work.kernels.most_vectors, step, vectors}), chunk = chunk_tiles(kWinogradPlanes * 4 * lanes * depth * std::min(step, vectors));
    for (int64_t first = 0; first < vectors; first += step) {
      const int64_t count = std::min(step, vectors - first);
      const WinogradSide in{from, transposed ? p.out_channels : p.in_channels, deep.data(), int64_t(deep.size())};
      const WinogradSide out{nullptr, transposed ? p.in_channels : p.out_channels, wide.data() + first, count};
      const WinogradProduct product{p.height, p.width, d.h, d.w, d.tiles.data(), in, out, to, p.in_channels, depth, transposed,
                                    transposed && &d != work.dilations.data(), nullptr, 0, nullptr,
                                    plane_floats(depth * count * lanes), plane_floats(chunk * int64_t(deep.size()) * lanes), plane_floats(chunk * widest * lanes)};
      pieces.push_back({product, panels_of(count, work.kernels.most_vectors), tiles, chunks_of(tiles, chunk), kWinogradPlanes * (product.deep_plane + product.wide_plane)});
    }
  }
  return pieces;
}

// Pieces [first, last) share a round: their weights are transformed together, and then all of their tiles; one after the
// other where they add to the same map.
void run_round(std::vector<Piece>& pieces, size_t first, size_t last, const WinogradKernels& kernels, float* weights, float* chunks, int64_t chunk_floats, int64_t workers) {
  std::vector<int64_t> weight_tasks{0}, chunk_tasks{0};
  for (size_t i = first; i < last; ++i) {
    WinogradProduct& p = pieces[i].product;
    p.panels = pieces[i].panels.data(), p.panel_count = int64_t(pieces[i].panels.size());
    p.weights = weights, weights += kWinogradPlanes * p.weight_plane;
    weight_tasks.push_back(weight_tasks.back() + p.wide.count * p.deep.count);
    chunk_tasks.push_back(chunk_tasks.back() + pieces[i].chunks);
  }
  const auto at = [](const std::vector<int64_t>& ends, int64_t task) { return std::upper_bound(ends.begin(), ends.end(), task) - ends.begin() - 1; };
  constexpr int64_t kWeightTasks = 16;
  for_tasks((weight_tasks.back() + kWeightTasks - 1) / kWeightTasks, workers, [&](int64_t, int64_t block) {
    for (int64_t task = block * kWeightTasks; task < std::min(weight_tasks.back(), (block + 1) * kWeightTasks); ++task) {
      const size_t i = at(weight_tasks, task);
      kernels.weights(pieces[first + i].product, task - weight_tasks[i], task - weight_tasks[i] + 1);
    }
  });
  const auto convolve = [&](int64_t worker, int64_t task) {
    const size_t i = at(chunk_tasks, task);
    const Piece& piece = pieces[first + i];
    const int64_t chunk = task - chunk_tasks[i], begin = piece.tiles * chunk / piece.chunks, end = piece.tiles * (chunk + 1) / piece.chunks;
    kernels.tiles(piece.product, begin, end - begin, chunks + worker * chunk_floats);
  };
  for (size_t i = 0; i + first < last;) {
    size_t next = i + 1;
    while (first + next < last && !pieces[first + next].product.transposed) ++next;
    const int64_t base = chunk_tasks[i];
    for_tasks(chunk_tasks[next] - base, workers, [&](int64_t worker, int64_t task) { convolve(worker, base + task); });
    i = next;
  }
}

void run_products(const Work& work, const float* from, float* to, bool transposed) {
  std::vector<Piece> pieces = pieces_of(work, from, to, transposed);
  std::vector<size_t> rounds{0};
  int64_t floats = 0, most_floats = 0, chunk_floats = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int64_t more = kWinogradPlanes * pieces[i].product.weight_plane;
    if (i > 0 && (floats + more) * 4 > std::min(kWeightBytes, scratch_limit() / 2)) rounds.push_back(i), floats = 0;
    floats += more;
    most_floats = std::max(most_floats, floats), chunk_floats = std::max(chunk_floats, int64_t(Scratch::padded(size_t(pieces[i].chunk_floats) * 4) / 4));
  }
  rounds.push_back(pieces.size());
  const int64_t fit = (scratch_limit() - most_floats * 4) / (chunk_floats * 4), workers = std::max<int64_t>(1, std::min(fit, threads()));
  Scratch scratch(Scratch::padded(size_t(most_floats) * 4) + Scratch::padded(size_t(workers * chunk_floats) * 4));
  float *const weights = scratch.take<float>(size_t(most_floats)), *const chunks = scratch.take<float>(size_t(workers * chunk_floats));
  for (size_t r = 0; r + 1 < rounds.size(); ++r) run_round(pieces, rounds[r], rounds[r + 1], work.kernels, weights, chunks, chunk_floats, workers);
}

// A part of the gradient of the weights: vectors of inputs and of outputs.
struct GradientPart {
  int64_t first_in, ins, first_out, outs;
};

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

// The largest pieces of scratch of any part, in floats.
struct GradientScratch {
  size_t x = 0, y = 0, sums = 0;
  size_t bytes() const { return Scratch::padded(x * 4) + Scratch::padded(y * 4) + Scratch::padded(sums * 4); }
};

WinogradGradient gradient_of(const Work& work, const Dilated& d, const GradientPart& part, int64_t step, const float* x, const float* grad, const std::vector<WinogradPanel>& panels) {
  const ConvProblem& p = work.p;
  const int64_t lanes = work.kernels.lanes, first = part.first_in * lanes, ins = std::min(p.in_channels - first, part.ins * lanes);
  const int64_t x_row = row_floats(part.ins * lanes), y_row = row_floats(part.outs * lanes);
  return {p.height, p.width, d.h, d.w, nullptr, {x, p.in_channels, work.inputs.data() + part.first_in, part.ins}, {grad, p.out_channels, d.channels.data() + part.first_out, part.outs}, p.in_channels, first, ins, false,
          panels.data(), int64_t(panels.size()), nullptr, nullptr, x_row, y_row, nullptr, plane_floats(step * x_row), plane_floats(step * y_row), plane_floats(ins * part.outs * lanes)};
}

// The gradient of the weights of some of the channels of one dilation, `step` tiles at a time.
void run_gradient(const Work& work, const Dilated& d, int64_t first, int64_t count, int64_t step, const float* x, const float* grad) {
  const bool mixed = std::any_of(d.channels.begin(), d.channels.end(), [](const WinogradChannels& c) { return c.mix_grad != nullptr; });
  const std::vector<GradientPart> parts = gradient_parts(int64_t(work.inputs.size()), first, count, mixed);
  const int64_t tiles = int64_t(d.tiles.size()), part_count = int64_t(parts.size());
  GradientScratch most;
  for (const GradientPart& part : parts) {
    const WinogradGradient g = gradient_of(work, d, part, step, x, grad, {});
    most.x = std::max(most.x, size_t(kWinogradPlanes * g.x_plane)), most.y = std::max(most.y, size_t(kWinogradPlanes * g.y_plane)), most.sums = std::max(most.sums, size_t(kWinogradPlanes * g.sum_plane));
  }
  const int64_t workers = std::clamp<int64_t>(scratch_limit() / int64_t(most.bytes()), 1, std::min(threads(), part_count));
  Scratch scratch(most.bytes() * size_t(workers));
  char* const memory = scratch.take<char>(most.bytes() * size_t(workers));
  for_tasks(part_count, workers, [&](int64_t worker, int64_t i) {
    const GradientPart& part = parts[size_t(i)];
    const std::vector<WinogradPanel> panels = panels_of(part.outs, work.kernels.most_vectors);
    WinogradGradient g = gradient_of(work, d, part, step, x, grad, panels);
    char* const own = memory + size_t(worker) * most.bytes();
    g.x_tiles = reinterpret_cast<float*>(own), g.y_tiles = reinterpret_cast<float*>(own + Scratch::padded(most.x * 4)), g.sums = reinterpret_cast<float*>(own + Scratch::padded(most.x * 4) + Scratch::padded(most.y * 4));
    for (int64_t begin = 0; begin < tiles; begin += step) {
      const int64_t now = std::min(step, tiles - begin);
      g.tiles = d.tiles.data() + begin, g.accumulate = begin > 0;
      work.kernels.gradient_tiles(g, 0, now);
      work.kernels.gradient_planes(g, 0, kWinogradPlanes * g.panel_count, now);
    }
    work.kernels.gradient_collect(g, 0, part.outs);
  });
}

void run_gradients(const Work& work, const float* x, const float* grad) {
  const int64_t limit = scratch_limit(), lanes = work.kernels.lanes, inputs = int64_t(work.inputs.size());
  for (const Dilated& d : work.dilations) {
    if (!weights_wanted(d)) continue;
    const int64_t vectors = int64_t(d.channels.size()), piece = std::min(vectors, piece_vectors(work.kernels, work.p.in_channels, std::min(kWeightBytes, limit / 2)));
    const int64_t tile_bytes = 4 * kWinogradPlanes * lanes * (inputs + piece), fit = std::min(kGradientBytes, limit / 2) / tile_bytes;
    const int64_t all = int64_t(d.tiles.size()), steps = (all + std::max<int64_t>(fit, 8) - 1) / std::max<int64_t>(fit, 8), step = (all + steps - 1) / steps;
    for (int64_t first = 0; first < vectors; first += piece) run_gradient(work, d, first, std::min(piece, vectors - first), step, x, grad);
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
    const int64_t tiles = p.images * winograd_axis_tiles(p.height, d.h) * winograd_axis_tiles(p.width, d.w);
    seconds += winograd_dilation_seconds(p, tiles, int64_t(d.channels.size()), lanes, backward, weights_wanted(d));
  }
  return seconds;
}

void winograd_forward(const ConvProblem& p, const void* x, void* y) { run_products(work_of(p), static_cast<const float*>(x), static_cast<float*>(y), false); }

void winograd_backward(const ConvProblem& p, const void* x, const void* grad, void* dx) {
  const Work work = work_of(p);
  if (dx) run_products(work, static_cast<const float*>(grad), static_cast<float*>(dx), true);
  run_gradients(work, static_cast<const float*>(x), static_cast<const float*>(grad));
}

}  // namespace

const ConvAlgorithm kWinogradConv = {"winograd", winograd_why_not, winograd_seconds, winograd_forward, winograd_backward};

}  // namespace nasdet
