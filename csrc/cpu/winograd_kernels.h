// The steps of Winograd's convolution and of its gradients, each over a range of tasks of any thread.
#pragma once
#include "winograd_gemm.h"
#include "winograd_maps.h"

namespace nasdet::NASDET_ISA {
namespace {

// Where row `k` of the weights of vector `v` of `wide` starts.
NASDET_INLINE float* weight_row(const WinogradProduct& p, int64_t panel, int64_t v, int64_t k) {
  const WinogradPanel& of = p.panels[panel];
  return p.weights + (of.first * p.depth + k * of.count + (v - of.first)) * W;
}

NASDET_INLINE int64_t panel_of(const WinogradPanel* panels, int64_t v) {
  int64_t panel = 0;
  while (v >= panels[panel].first + panels[panel].count) ++panel;
  return panel;
}

void transform_weights(const WinogradProduct& p, int64_t task) {
  constexpr int64_t kRowsAhead = 4;  // the weights have left the caches since the last call
  const int64_t panel = panel_of(p.panels, task / p.deep.count);
  const WinogradPanel& of = p.panels[panel];
  // Vectors that share cache lines come one after the other, or two threads would each write half of them.
  const int64_t together = kPartOfLine ? of.count : 1, rest = task - of.first * p.deep.count;
  const int64_t v = of.first + rest / (together * p.deep.count) * together + rest % together;
  const int64_t d = rest / together % p.deep.count;
  const int64_t ahead = kRowsAhead * of.count * W;
  const int64_t rows = p.depth - d * W < W ? p.depth - d * W : W;
  TermTaps terms;
  terms.load(p, v, d);
  for (int64_t k = 0; k < rows; ++k) {
    float* const out = weight_row(p, panel, v, d * W + k);
    transform_kernel(terms.taps + k * terms.term, terms.step, [&](int plane, Vector value) {
      store(out + plane * p.weight_plane, value);
      __builtin_prefetch(out + plane * p.weight_plane + ahead, kPartOfLine, 2);
    });
  }
}

// `count` tiles from `first` on, through `scratch`: [planes][tiles][deep] and [planes][tiles][panels of a go].
void convolve_tiles(const WinogradProduct& p, int64_t first, int64_t count, float* scratch) {
  const Domain inputs{scratch, p.deep.count * W, p.deep_plane};
  float* const outputs = scratch + kWinogradPlanes * p.deep_plane;
  const WinogradTile* const tiles = p.tiles + first;
  WinogradRows rows;
  rows.for_tiles(tiles, count, [&](const WinogradTile& tile, const WinogradRows& at) {
    transform_inputs(p, p.deep, tile, inputs, at);
  });
  for (int64_t k = 0; k < p.panel_count; k += p.panels_of_go) {
    const int64_t last = k + p.panels_of_go < p.panel_count ? k + p.panels_of_go : p.panel_count;
    const WinogradPanel *const panels = p.panels + k, *const end = p.panels + last;
    const WinogradPanel go{panels->first, end[-1].first + end[-1].count - panels->first};
    const Domain sums{outputs, go.count * W, p.wide_plane};
    for (int64_t plane = 0; plane < kWinogradPlanes; ++plane) {
      ask_for_outputs(p, go, tiles, count, plane);
      if (rows.of(plane) == 0) continue;
      for (const WinogradPanel* panel = panels; panel < end; ++panel) {
        const float* const weights = weight_row(p, panel - p.panels, panel->first, 0) + plane * p.weight_plane;
        const int64_t wide = panel->count * W;
        const float* const next =
            panel + 1 < end ? weights + p.depth * wide : weight_row(p, k, go.first, 0) + (plane + 1) * p.weight_plane;
        multiply(panel->count, inputs.data + plane * inputs.plane, inputs.row, 1, weights, wide,
                 sums.data + plane * sums.plane + (panel->first - go.first) * W, sums.row, rows.of(plane), p.depth,
                 false, next, p.depth * wide / rows.of(plane));
      }
    }
    write_tiles(p, go, tiles, count, sums);
  }
}

// `count` tiles from `first` on, for all columns.
void column_inputs(const WinogradColumns& job, int64_t first, int64_t count) {
  constexpr int64_t kVectors = kColumnTerms / W;
  const WinogradProduct& p = job.product;
  WinogradRows rows;
  rows.add(p.tiles, first);
  rows.for_tiles(p.tiles + first, count, [&](const WinogradTile& tile, const WinogradRows& at) {
    WinogradSide side = p.deep;
    Domain to{job.inputs, kColumnTerms, job.input_plane};
    for (int64_t left = p.deep.count; left > 0;
         left -= kVectors, side.vectors += kVectors, to.data += job.input_block) {
      side.count = left < kVectors ? left : kVectors;
      transform_inputs(p, side, tile, to, at);
    }
  });
}

// Through `scratch`: [planes][weights of kColumnVectors], the sums, [planes][tiles][wide], and a block of inputs that are not given.
void convolve_columns(const WinogradColumns& job, float* scratch) {
  const WinogradProduct& whole = job.product;
  const Domain sums{scratch + kWinogradPlanes * whole.weight_plane, whole.wide.count * W, whole.wide_plane};
  Domain inputs{job.inputs ? job.inputs : sums.data + kWinogradPlanes * sums.plane, kColumnTerms, job.input_plane};
  WinogradRows rows;
  rows.add(whole.tiles, job.tiles);
  for (int64_t k = 0; k < whole.depth; k += kColumnTerms, inputs.data += job.inputs ? job.input_block : 0) {
    WinogradProduct p = whole;
    p.weights = scratch;
    p.depth = whole.depth - k < kColumnTerms ? whole.depth - k : kColumnTerms;
    p.deep.vectors += k / W, p.deep.count = (p.depth + W - 1) / W;
    if (job.inputs == nullptr)
      WinogradRows{}.for_tiles(p.tiles, job.tiles, [&](const WinogradTile& tile, const WinogradRows& at) {
        transform_inputs(p, p.deep, tile, inputs, at);
      });
    for (int64_t first = 0; first < whole.wide.count; first += kColumnVectors) {
      const WinogradPanel panel{0,
                                whole.wide.count - first < kColumnVectors ? whole.wide.count - first : kColumnVectors};
      p.wide.vectors = whole.wide.vectors + first, p.wide.count = panel.count;
      p.panels = &panel, p.panel_count = 1;
      for (int64_t task = 0; task < panel.count * p.deep.count; ++task) transform_weights(p, task);
      for (int64_t plane = 0; plane < kWinogradPlanes; ++plane)
        multiply(panel.count, inputs.data + plane * inputs.plane, inputs.row, 1, p.weights + plane * p.weight_plane,
                 panel.count * W, sums.data + plane * sums.plane + first * W, sums.row, rows.of(plane), p.depth, k > 0,
                 inputs.data + (plane + 1) * inputs.plane, inputs.row);
    }
  }
  write_tiles(whole, {0, whole.wide.count}, whole.tiles, job.tiles, sums);
}

// Zeros in the planes that a tile is not in.
NASDET_INLINE void clear_absent(const WinogradTile& tile, const WinogradSide& side, const Domain& to, int64_t row) {
  if (tile.whole()) return;
  for (int64_t plane = 0; plane < kWinogradPlanes; ++plane)
    for (int64_t v = 0; v < side.count && !tile.has(plane); ++v)
      store(to.data + plane * to.plane + row * to.row + v * W, Vector{});
}

// All tiles of a piece; those on matrix tiles keep their places in all planes, so that sums are the same for any pieces.
void gradient_tiles(const WinogradGradient& g) {
  const Domain x{g.x_tiles, g.x_row, g.x_plane}, y{g.y_tiles, g.y_row, g.y_plane};
  const auto transform = [&](const WinogradTile& tile, const WinogradRows& at) {
    transform_inputs(g, g.x, tile, x, at);
    transform_tile<GradientLine>(g, g.y, tile, tile.row, tile.column, y, at);
  };
  WinogradRows rows;
  for (int64_t i = 0; i < g.tile_count; ++i) {
    const WinogradTile& tile = g.tiles[i];
    transform(tile, rows);
    if (!g.on_tiles) {
      rows.add(tile);
      continue;
    }
    clear_absent(tile, g.x, x, i), clear_absent(tile, g.y, y, i);
    ++rows.whole;
  }
}

void gradient_planes(const WinogradGradient& g) {
  WinogradRows rows;
  rows.add(g.tiles, g.tile_count);
  for (int64_t plane = 0; plane < kWinogradPlanes; ++plane)
    for (int64_t k = 0; k < g.panel_count; ++k) {
      const WinogradPanel& panel = g.panels[k];
      const int64_t row = panel.count * W;
      float* const sums = g.sums + plane * g.sum_plane + panel.first * g.sum_rows * W;
      multiply(panel.count, g.x_tiles + plane * g.x_plane, 1, g.x_row, g.y_tiles + plane * g.y_plane + panel.first * W,
               g.y_row, sums, row, g.ins, rows.of(plane), g.accumulate, sums + most_rows(int(panel.count)) * row, row);
    }
}

// The gradients of the kernels and of the mixture for a vector of y's channels, from the sums over all tiles.
void collect_gradient(const WinogradGradient& g, int64_t v) {
  const WinogradChannels& y = g.y.vectors[v];
  const WinogradPanel& panel = g.panels[panel_of(g.panels, v)];
  const float* const sums = g.sums + (panel.first * g.sum_rows + (v - panel.first)) * W;
  const Vector factor = y.mix ? load_up_to(y.mix, y.count) : splat(1.f);
  Vector taps[9 * W], kernels[9 * W], dot = {};
  for (int64_t c = 0; c < g.ins; c += W) {
    const int64_t in = g.first_in + c, valid = g.ins - c < W ? g.ins - c : W, length = valid * 9;
    for (int64_t i = 0; i < W; ++i) {
      if (i < valid) collect_kernel(sums + (c + i) * panel.count * W, g.sum_plane, taps + i * 9);
      else
        for (int tap = 0; tap < 9; ++tap) taps[i * 9 + tap] = Vector{};
    }
    if (y.mix_grad) {
      load_taps(y, g.in_channels, in, false, kernels);
      for (int i = 0; i < 9 * W; ++i) dot += kernels[i] * taps[i];
    }
    if (!y.weight_grad) continue;
    for (int q = 0; q < 9; ++q) {
      Vector* const rows = taps + q * W;
      for (int i = 0; i < W; ++i) rows[i] *= factor;
      transpose(rows);
      for (int64_t o = 0; o < y.count; ++o)
        store_up_to(y.weight_grad + (o * g.in_channels + in) * 9 + q * W, rows[o], length - q * W);
    }
  }
  if (y.mix_grad) store_up_to(y.mix_grad, dot, y.count);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
