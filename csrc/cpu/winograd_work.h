// A problem for Winograd's convolution, cut into dilations, and the kernels for it. Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include <vector>

#include "caches.h"
#include "conv.h"
#include "scratch.h"
#include "tasks.h"
#include "winograd_cost.h"

namespace nasdet {
namespace {

constexpr int64_t kWeightBytes = 10 << 20;  // of a piece's weights in the domain: read for each chunk of tiles
constexpr int64_t kTilesPerMiB =
    12;  // of a core's cache: a chunk of tiles in the domain, which a panel's outputs and weights pass by

struct WinogradKernels {
  decltype(&avx2::winograd_weights) weights;
  decltype(&avx2::winograd_tiles) tiles;
  decltype(&avx2::winograd_column_inputs) column_inputs;
  decltype(&avx2::winograd_columns) columns;
  decltype(&avx2::winograd_gradient_tiles) gradient_tiles;
  decltype(&avx2::winograd_gradient_planes) gradient_planes;
  decltype(&avx2::winograd_gradient_collect) gradient_collect;
  int64_t lanes, most_vectors;
};

// The kernels on matrix tiles.
struct WinogradAmxKernels {
  decltype(&baseline::winograd_amx_weights) weights;
  decltype(&baseline::winograd_amx_chunk) chunk;
  decltype(&baseline::winograd_amx_inputs) inputs;
  decltype(&baseline::winograd_amx_columns) columns;
  decltype(&baseline::winograd_amx_gradient) gradient;
};

const WinogradKernels* winograd_kernels() {
#define NASDET_WINOGRAD(isa, ...)                                                                                \
  {                                                                                                              \
    isa::winograd_weights, isa::winograd_tiles, isa::winograd_column_inputs, isa::winograd_columns,              \
        isa::winograd_gradient_tiles, isa::winograd_gradient_planes, isa::winograd_gradient_collect, __VA_ARGS__ \
  }
  static constexpr WinogradKernels kBaseline = NASDET_WINOGRAD(baseline, 4, 2);
  if (tiles() == Tiles::emulated) return &kBaseline;
#ifdef NASDET_X86
  static constexpr WinogradKernels kAvx2 = NASDET_WINOGRAD(avx2, 8, 2), kAvx512 = NASDET_WINOGRAD(avx512, 16, 4);
  if (cpu_capability() >= Isa::avx512) return &kAvx512;
  if (cpu_capability() == Isa::avx2) return &kAvx2;
#endif
#undef NASDET_WINOGRAD
  return nullptr;
}

// The slices of one dilation.
struct Dilated {
  int64_t h, w;
  bool on_tiles;  // multiplied on matrix tiles
  // Multiplied so many at a time by columns of weights; 0: chunks of them by pieces of the weights.
  int64_t column_tiles;
  std::vector<WinogradChannels> channels;
  std::vector<WinogradTile> tiles;
};

struct Work {
  const ConvProblem& p;
  const WinogradKernels& kernels;
  std::vector<WinogradChannels> inputs;
  std::vector<Dilated> dilations;  // those on matrix tiles first
};

void add_channels(std::vector<WinogradChannels>& to, int64_t first, int64_t last, int64_t lanes) {
  for (int64_t c = first; c < last; c += lanes)
    to.push_back({c, std::min(lanes, last - c), nullptr, nullptr, nullptr, nullptr});
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

int64_t tiles_of(const ConvProblem& p, const Dilated& d) {
  return p.images * winograd_axis_tiles(p.height, d.h) * winograd_axis_tiles(p.width, d.w);
}

// How many of the 4 pixels from `first` on, a dilation apart, are in a map of `size`.
int16_t outputs_of(int64_t first, int64_t dilation, int64_t size) {
  return int16_t(std::min<int64_t>((size - first + dilation - 1) / dilation, 4));
}

// Pixels a dilation apart form an image of their own, which is cut into tiles, from the top left. Tiles of a kind are together,
// the whole ones first.
void add_tiles(Dilated& d, const ConvProblem& p) {
  d.tiles.reserve(size_t(tiles_of(p, d)));
  for (int64_t n = 0; n < p.images; ++n)
    for (int64_t phase_h = 0; phase_h < d.h; ++phase_h)
      for (int64_t row = phase_h; row < p.height; row += 4 * d.h)
        for (int64_t phase_w = 0; phase_w < d.w; ++phase_w)
          for (int64_t column = phase_w; column < p.width; column += 4 * d.w)
            d.tiles.push_back({int32_t(n), int32_t(row), int32_t(column), outputs_of(row, d.h, p.height),
                               outputs_of(column, d.w, p.width)});
  std::stable_sort(d.tiles.begin(), d.tiles.end(), [](const WinogradTile& a, const WinogradTile& b) {
    return std::pair(a.rows, a.columns) > std::pair(b.rows, b.columns);
  });
}

// Whether to multiply a dilation's slices on matrix tiles: splitting floats pays where each of their parts meets many channels.
// Emulated tiles are for tests, and take any number.
bool tiles_pay(const ConvProblem& p, const Dilated& d, int64_t lanes) {
  constexpr int64_t kLeast = 96;
  return tiles() == Tiles::hardware ? std::min(p.in_channels, int64_t(d.channels.size()) * lanes) >= kLeast
                                    : tiles() == Tiles::emulated;
}

// Columns are for few tiles: the weights would go through the outer caches for little use. So many stay in a core's cache beside the
// weights of a block of terms, and with all of their channels within half of the scratch's limit. On AVX2 the inputs of wide slices may
// pass by, for each piece of the weights would make them anew. Where the weights would be cut into pieces the columns may take several
// goes. Each thread has columns of its own.
int64_t column_tiles(const ConvProblem& p, const Dilated& d, int64_t lanes) {
  constexpr int64_t kPlanes = kWinogradPlanes * 4, kGoes = 3, kWide = 192;
  const int64_t panel = kColumnVectors * lanes;
  const auto within = [&](int64_t bytes, int64_t terms) {
    return (bytes / kPlanes - column_weights(lanes)) / (terms + panel);
  };
  const int64_t tiles = tiles_of(p, d), outs = int64_t(d.channels.size()) * lanes;
  const int64_t most = std::min(within(core_cache(), lanes == 8 && outs >= kWide ? 0 : kColumnTerms),
                                within(scratch_limit() / 2, std::max(p.in_channels, outs) + kColumnTerms));
  const int64_t goes = kPlanes * p.in_channels * outs > kWeightBytes ? kGoes : 1;
  return outs >= panel && most > 0 && tiles <= goes * most ? most : 0;
}

std::vector<Dilated> dilations_of(const ConvProblem& p, int64_t lanes) {
  std::vector<Dilated> dilations;
  for (const ConvBranch& b : p.branches) {
    // beyond the map all are alike
    const int64_t h = std::min<int64_t>(b.dilation_h, p.height);
    const int64_t w = std::min<int64_t>(b.dilation_w, p.width);
    auto at = std::find_if(dilations.begin(), dilations.end(), [&](const Dilated& d) { return d.h == h && d.w == w; });
    if (at == dilations.end()) at = dilations.insert(at, {h, w, false, 0, {}, {}});
    add_branch(at->channels, b, p.in_channels * 9, lanes);
  }
  for (Dilated& d : dilations) {
    d.on_tiles = tiles_pay(p, d, lanes);
    if (!d.on_tiles) d.column_tiles = column_tiles(p, d, lanes);
  }
  std::stable_partition(dilations.begin(), dilations.end(), [](const Dilated& d) { return d.on_tiles; });
  return dilations;
}

bool weights_wanted(const Dilated& d) {
  return std::any_of(d.channels.begin(), d.channels.end(),
                     [](const WinogradChannels& c) { return c.weight_grad || c.mix_grad; });
}

bool mixture_wanted(const Dilated& d) {
  return std::any_of(d.channels.begin(), d.channels.end(),
                     [](const WinogradChannels& c) { return c.mix_grad != nullptr; });
}

const WinogradAmxKernels& winograd_amx_kernels() {
  static const WinogradAmxKernels kernels = {
      NASDET_TILE_KERNEL(winograd_amx_weights), NASDET_TILE_KERNEL(winograd_amx_chunk),
      NASDET_TILE_KERNEL(winograd_amx_inputs), NASDET_TILE_KERNEL(winograd_amx_columns),
      NASDET_TILE_KERNEL(winograd_amx_gradient)};
  return kernels;
}

Work work_of(const ConvProblem& p) {
  const WinogradKernels& kernels = *winograd_kernels();
  Work work{p, kernels, {}, dilations_of(p, kernels.lanes)};
  add_channels(work.inputs, 0, p.in_channels, kernels.lanes);
  for (Dilated& d : work.dilations) add_tiles(d, p);
  return work;
}

int64_t plane_floats(int64_t floats) {
  return (floats + 1023) / 1024 * 1024 + 16;
}  // planes a power of 2 apart share cache sets

// Floats of a row that is read down its columns: an odd number of cache lines.
int64_t row_floats(int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

int64_t rows_of(const std::vector<WinogradChannels>& channels, int64_t lanes) {
  return int64_t(channels.size() - 1) * lanes + channels.back().count;
}

// The gradient of x adds up over the dilations, and so is read again.
WinogradWrite write_of(const Work& work, const Dilated& d, const float* to, int64_t channels, bool transposed) {
  if (transposed && &d != work.dilations.data()) return WinogradWrite::add;
  const bool past = work.kernels.lanes == 16 && (!transposed || work.dilations.size() == 1) &&
                    written_past(to, channels * 4, work.p.map_floats() * 4);
  return past ? WinogradWrite::stream : WinogradWrite::store;
}

// The product of one dilation with all of its channels, but for the cut: panels, weights and planes.
WinogradProduct product_of(const Work& work, const Dilated& d, const float* from, float* to, bool transposed) {
  const ConvProblem& p = work.p;
  const std::vector<WinogradChannels>& deep = transposed ? d.channels : work.inputs;
  const std::vector<WinogradChannels>& wide = transposed ? work.inputs : d.channels;
  WinogradProduct product{};
  product.height = p.height;
  product.width = p.width;
  product.dilation_h = d.h;
  product.dilation_w = d.w;
  product.tiles = d.tiles.data();
  product.deep = {from, transposed ? p.out_channels : p.in_channels, deep.data(), int64_t(deep.size())};
  product.wide = {nullptr, transposed ? p.in_channels : p.out_channels, wide.data(), int64_t(wide.size())};
  product.out = to;
  product.in_channels = p.in_channels;
  product.depth = rows_of(deep, work.kernels.lanes);
  product.transposed = transposed;
  product.write = write_of(work, d, to, product.wide.pixel, transposed);
  return product;
}

// `vectors` in panels of about equal width.
std::vector<WinogradPanel> panels_of(int64_t vectors, int64_t most) {
  std::vector<WinogradPanel> panels;
  const int64_t count = (vectors + most - 1) / most;
  for (int64_t i = 0; i < count; ++i)
    panels.push_back({vectors * i / count, vectors * (i + 1) / count - vectors * i / count});
  return panels;
}

// How many vectors of weights with `depth` rows a piece takes: whole panels if a few of them fit.
int64_t piece_vectors(const WinogradKernels& k, int64_t depth, int64_t bytes) {
  const int64_t fit = std::max<int64_t>(1, bytes / (kWinogradPlanes * 4 * k.lanes * depth));
  return fit > k.most_vectors ? fit / k.most_vectors * k.most_vectors : fit;
}

constexpr int64_t kProductRows = 6;  // of tiles, which fill the registers of a product

// Tiles of a chunk: so many by the core's cache, whatever the channels, and half as many where all weights stay there too.
int64_t chunk_tiles(int64_t weight_bytes) {
  constexpr int64_t kLeastTiles = 2 * kProductRows;
  const int64_t tiles = std::max<int64_t>(kTilesPerMiB * core_cache() >> 20, kLeastTiles);
  return weight_bytes <= core_cache() ? (tiles + 1) / 2 : tiles;
}

// How many chunks of about equal size: as many for each thread, if they are worth it.
int64_t chunks_of(int64_t tiles, int64_t most) {
  const int64_t chunks = (tiles + most - 1) / most, even = (chunks + threads() - 1) / threads() * threads();
  return even * kProductRows <= tiles ? even : chunks;
}

// Tiles of each chunk but the last: whole products, or about equally many where there are few chunks for each thread.
int64_t chunk_size(int64_t tiles, int64_t most) {
  constexpr int64_t kFew = 3;
  const int64_t whole = most / kProductRows * kProductRows;
  if (tiles >= kFew * threads() * whole) return whole;
  const int64_t chunks = chunks_of(tiles, most);
  return (tiles + chunks - 1) / chunks;
}

}  // namespace
}  // namespace nasdet
