// How a convolution in the frequency domain is cut into pieces: which tiles, and how many channels at once, so that the
// scratch stays within its limit and the least time is expected. All of it follows from the problem and the limit alone.
#pragma once
#include <algorithm>
#include <cstdint>

#include "caches.h"
#include "conv.h"
#include "frequency.h"
#include "frequency_fold.h"
#include "scratch.h"

namespace nasdet {
namespace {

constexpr int64_t kFrequencyCached = 5 << 20;  // bytes of a spectrum up to which it is expected to stay in the caches

// What was measured on one core, in seconds.
struct FrequencyCosts {
  int lanes, panel;
  double flop;                       // of the matrix products at their best
  double least_rows;                 // of tiles, below which a product takes no less: its weights are read all the same
  double stored_terms, added_terms;  // terms of a sum that it costs to store it, or to read and store it
  double cached_byte, byte;          // to read from the outer cache, and from memory
  double point, point_back;          // of a transform of one vector of channels, for each of T * T points
  double tap,
      element;  // of a vector of weights: to gather or scatter a tap, and for each of its half and of its planes
};

inline FrequencyCosts frequency_costs() {
#ifdef NASDET_X86
  if (cpu_capability() >= Isa::avx512)
    return {16, 64, 1 / 105e9, 1.5, 1, 3.2, 1 / 110e9, 1 / 35e9, 1.1e-8, 1.15e-8, 9e-9, 1.4e-9};
#endif
  return {8, 16, 1 / 105e9, 5.5, 1, 3.2, 1 / 110e9, 1 / 35e9, 8.5e-9, 9e-9, 8e-9, 9e-10};
}

inline int64_t pieces_of(int64_t all, int64_t part) { return (all + part - 1) / part; }
inline int64_t padded_to(int64_t count, int64_t unit) { return pieces_of(count, unit) * unit; }

// Elements from plane to plane: no multiple of 8 cache lines, so that planes side by side use many sets of a cache.
inline int64_t plane_stride(int64_t elements) {
  const int64_t lines = pieces_of(elements, 16);
  return (lines % 8 == 0 ? lines + 1 : lines) * 16;
}

// The tiles of a problem.
struct FrequencyGeometry {
  int tile, grid;
  int32_t radius_h, radius_w, step_h, step_w;
  int64_t rows, columns, all_rows;  // of one image, and rows of all

  int64_t planes() const { return frequency_planes(tile); }
  FrequencyTiles tiles(const ConvProblem& p, int64_t channels, bool with_margin, int64_t first_row,
                       int64_t row_count) const {
    return {p.height, p.width,  channels,     int32_t(rows),       int32_t(columns),    step_h, step_w,
            radius_h, radius_w, !with_margin, first_row * columns, row_count * columns, false};
  }
};

constexpr int32_t kLeastStep = 4;  // outputs of a tile, in each direction

inline int32_t frequency_radius(const ConvProblem& p, bool horizontal) {
  int32_t radius = 1;
  for (const ConvBranch& b : p.branches) radius = std::max(radius, horizontal ? b.dilation_w : b.dilation_h);
  return radius;
}

// False where the tile leaves too few outputs or no kernel exists for it.
inline bool frequency_geometry(const ConvProblem& p, int tile, FrequencyGeometry& g) {
  g.tile = tile, g.grid = 0;
  g.radius_h = frequency_radius(p, false), g.radius_w = frequency_radius(p, true);
  const int64_t widest = 2 * int64_t(std::max(g.radius_h, g.radius_w)) + 1;
  if (widest - 1 > tile - kLeastStep) return false;
  for (int grid : kFrequencyGrids)
    if (g.grid == 0 && widest <= grid && (grid < 29 || tile == 32)) g.grid = grid;
  if (g.grid == 0) return false;
  g.step_h = tile - 2 * g.radius_h, g.step_w = tile - 2 * g.radius_w;
  g.rows = pieces_of(p.height, g.step_h), g.columns = pieces_of(p.width, g.step_w);
  g.all_rows = p.images * g.rows;
  return true;
}

inline int64_t frequency_outs() { return frequency_most_outs(frequency_costs().lanes); }
// Bytes of a chunk's folded weights, which are to stay in the inner cache.
inline int64_t folded_bytes() { return std::min<int64_t>(core_cache() * 5 / 16, 320 << 10); }

// What the pieces of scratch take, in elements.
struct FrequencySizes {
  const FrequencyGeometry& g;
  int64_t rows, terms;  // of tiles in hand, and of folded taps

  int64_t tiles() const { return rows * g.columns; }
  int64_t plane(int64_t block) const { return plane_stride(tiles() * block); }
  int64_t spectra(int64_t channels, int64_t block) const {
    return pieces_of(channels, block) * g.planes() * plane(block);
  }
  int64_t folded(int64_t ins, int64_t outs) const { return ins * outs * terms; }
  // Planes of a step, and operands as they are multiplied.
  int64_t step() const { return step_planes() + tiles() * kFrequencyBlock; }
  int64_t gradient_step(int64_t outs) const { return step_planes() + tiles() * (kFrequencyBlock + 2 * outs); }
  int64_t step_planes() const { return frequency_step_planes(g.tile) * frequency_step_plane(frequency_costs().lanes); }
};

// How many of the gradient of the input: of few channels, less at a time leave room in the caches for the spectra they come from.
inline int64_t gradient_outs(int64_t channels) {
  constexpr int64_t kLess = 48;
  const bool less = channels <= 3 * kLess && (channels % kLess == 0 || channels % kLess == 32);
  return less ? std::min(kLess, frequency_outs()) : frequency_outs();
}

inline int64_t block_of(int64_t channels) { return std::min(channels, kFrequencyBlock); }

// A convolution (forward, or of the gradient to the input): all inputs of some rows of tiles in hand at once, then
// `outs` outputs. Their weights are folded for `ins` inputs.
struct FrequencyPlan {
  FrequencyGeometry g;
  int64_t rows, outs, ins, terms;
  double seconds;
  int64_t bytes;
  FrequencySizes sizes() const { return {g, rows, terms}; }
};

// The gradient of the weights: spectra of `ins` and `outs` channels of some rows of tiles in hand, of which products of
// part_ins x part_outs are gathered as folded taps.
struct FrequencyGradientPlan {
  FrequencyGeometry g;
  int64_t rows, outs, ins, part_outs, part_ins, terms;
  double seconds;
  int64_t bytes;
  FrequencySizes sizes() const { return {g, rows, terms}; }
};

// Both gradients. Where both hold all tiles of the output's gradient at once, its spectra serve both.
struct FrequencyBackwardPlan {
  FrequencyPlan dx;
  FrequencyGradientPlan dw;
  bool shared;
  double seconds;
};

class FrequencyPlanner {
 public:
  explicit FrequencyPlanner(const ConvProblem& p)
      : p_(p),
        limit_(scratch_limit()),
        in_padded_(padded_to(p.in_channels, c_.lanes)),
        out_padded_(padded_to(p.out_channels, c_.lanes)),
        terms_(TapFold(p).terms()),
        taps_(0) {
    for (const ConvBranch& b : p.branches) taps_ += 9 * double(b.last - b.first) / double(p.out_channels);
  }

  FrequencyPlan forward() const { return convolution(in_padded_, out_padded_, frequency_outs(), 0, false); }

  FrequencyBackwardPlan backward() const {
    const int64_t outs = gradient_outs(in_padded_);
    FrequencyBackwardPlan best{convolution(out_padded_, in_padded_, outs, 0, false), gradient(0, false), false, 0};
    best.seconds = best.dx.seconds + best.dw.seconds;
    for (int tile : kFrequencyTiles) {
      FrequencyBackwardPlan plan{convolution(out_padded_, in_padded_, outs, tile, true), gradient(tile, true), true, 0};
      if (plan.dx.bytes == 0 || plan.dw.bytes == 0 || std::max(plan.dx.bytes, plan.dw.bytes) > limit_) continue;
      plan.seconds = plan.dx.seconds + plan.dw.seconds - map_transforms(plan.dx.g, out_padded_, c_.point);
      const auto worth = [&](const FrequencyBackwardPlan& b) {
        return worth_of(b.seconds, std::max(b.dx.bytes, b.dw.bytes));
      };
      if (worth(plan) < worth(best)) best = plan;
    }
    return best;
  }

 private:
  // `outs` at a time; with one tile, or any (0); `whole`: with all tiles in hand at once. No bytes where there is no such plan.
  FrequencyPlan convolution(int64_t in, int64_t out, int64_t outs, int only, bool whole) const {
    FrequencyPlan best{};
    for (int tile : kFrequencyTiles) {
      FrequencyPlan plan{};
      if ((only && tile != only) || !frequency_geometry(p_, tile, plan.g)) continue;
      plan.terms = terms_, plan.outs = std::min(outs, out), plan.ins = folded_ins(in, plan.outs);
      for (int64_t parts = 1; parts == 1 || !whole; parts += (parts + 1) / 2) {
        plan.rows = pieces_of(plan.g.all_rows, parts);
        const FrequencySizes s = plan.sizes();
        plan.bytes = bytes(
            {s.spectra(in, block_of(in)), s.spectra(plan.outs, plan.outs), s.folded(plan.ins, plan.outs), s.step()});
        plan.seconds = seconds(plan, in, out);
        if (better(plan, best)) best = plan;
        if (plan.rows == 1) break;
      }
    }
    return best;
  }

  // `whole`: with all tiles and outputs in hand at once.
  FrequencyGradientPlan gradient(int only, bool whole) const {
    FrequencyGradientPlan best{};
    for (int tile : kFrequencyTiles) {
      FrequencyGradientPlan plan{};
      if ((only && tile != only) || !frequency_geometry(p_, tile, plan.g)) continue;
      plan.terms = terms_;
      for (int64_t ins : {kFrequencyBlock, 2 * kFrequencyBlock, 8 * kFrequencyBlock, in_padded_}) {
        for (int64_t outs : {frequency_outs(), 2 * frequency_outs(), 4 * frequency_outs(), out_padded_}) {
          plan.ins = std::min(ins, in_padded_), plan.outs = std::min(outs, out_padded_);
          if (!whole || plan.outs == out_padded_) try_rows(plan, whole, best);
          if (plan.outs == out_padded_) break;
        }
        if (plan.ins == in_padded_) break;
      }
    }
    return best;
  }

  void try_rows(FrequencyGradientPlan plan, bool whole, FrequencyGradientPlan& best) const {
    plan.rows = plan.g.all_rows;
    plan.part_outs = std::min(frequency_outs(), plan.outs), plan.part_ins = folded_ins(plan.ins, plan.part_outs);
    consider(plan, best);
    if (whole || best.bytes <= limit_) return;
    for (int64_t parts = 2; plan.rows > 1; parts += (parts + 1) / 2) {
      plan.rows = pieces_of(plan.g.all_rows, parts);
      consider(plan, best);
    }
  }
  void consider(FrequencyGradientPlan& plan, FrequencyGradientPlan& best) const {
    const FrequencySizes s = plan.sizes();
    // Sums over tiles in several goes: then those of all that is in hand are kept.
    const bool goes = plan.rows < plan.g.all_rows;
    plan.bytes = bytes({s.spectra(plan.ins, block_of(plan.ins)), s.spectra(plan.outs, block_of(plan.outs)),
                        goes ? s.folded(plan.ins, plan.outs) : s.folded(plan.part_ins, plan.part_outs),
                        s.gradient_step(plan.part_outs)});
    plan.seconds = seconds(plan);
    if (better(plan, best)) best = plan;
  }

  // Memory counts a little: of plans that are about as fast, a small one.
  double worth_of(double seconds, int64_t bytes) const {
    return seconds * (1 + .06 * double(bytes) / double(64 << 20));
  }
  // Within the limit if any is, then the faster; else the smaller.
  template <class Plan> bool better(const Plan& a, const Plan& b) const {
    if (b.bytes == 0) return true;
    const bool fits = a.bytes <= limit_, other_fits = b.bytes <= limit_;
    return fits != other_fits ? fits
           : fits             ? worth_of(a.seconds, a.bytes) < worth_of(b.seconds, b.bytes)
                              : a.bytes < b.bytes;
  }

  // As many as leave the folded weights in the inner cache.
  int64_t folded_ins(int64_t in, int64_t outs) const {
    const int64_t most = folded_bytes() / (terms_ * outs * 4) / kFrequencyBlock * kFrequencyBlock;
    return std::min(in, std::max(most, kFrequencyBlock));
  }
  static int64_t bytes(std::initializer_list<int64_t> pieces) {
    int64_t total = 0;
    for (int64_t elements : pieces) total += int64_t(Scratch::padded(size_t(elements) * 4));
    return total;
  }

  // Real products of planes.
  static double products(const FrequencyGeometry& g) { return double(3 * frequency_bins(g.tile) + 4); }
  // Of sums of `depth` terms, `piece` at a time.
  double product(const FrequencyGeometry& g, double rows, double columns, double depth, double piece,
                 double piece_columns) const {
    const double vectors = std::min<double>(piece_columns, c_.panel) / c_.lanes;
    const double narrow = c_.lanes < 16 || vectors > 2 ? 1 : 1.5;  // tiles of 12 rows have more to address
    return 2 * c_.flop * narrow * products(g) * std::max(rows, c_.least_rows) * columns * depth *
           (1 + (piece < depth ? c_.added_terms : c_.stored_terms) / piece);
  }
  double byte_of(int64_t bytes) const { return bytes > kFrequencyCached ? c_.byte : c_.cached_byte; }
  double map_transforms(const FrequencyGeometry& g, int64_t channels, double point) const {
    const double outgrown = g.tile > 24 ? 1.4 : 1;  // half a spectrum of 32 x 32 does not stay in the inner cache
    return point * outgrown * g.tile * g.tile * double(g.all_rows * g.columns) * double(channels) / c_.lanes;
  }
  double weight_transforms(const FrequencyGeometry& g, double taps) const {
    return double(in_padded_) * double(out_padded_) / c_.lanes *
           (c_.element * (products(g) + .3 * double(terms_ * g.tile / 2)) + c_.tap * taps);
  }

  double seconds(const FrequencyPlan& plan, int64_t in, int64_t out) const {
    const FrequencyGeometry& g = plan.g;
    const FrequencySizes s = plan.sizes();
    const double tiles = double(g.all_rows * g.columns);
    const double goes = double(pieces_of(g.all_rows, plan.rows));
    const double planes = 4 * double(g.planes());
    const double passes = double(pieces_of(in, plan.ins)), out_byte = byte_of(4 * s.spectra(plan.outs, plan.outs));
    return map_transforms(g, in, c_.point) + map_transforms(g, out, c_.point_back) +
           weight_transforms(g, taps_) * goes +
           product(g, tiles, double(out), double(in), double(block_of(in)), double(plan.outs)) +
           2 * planes * tiles * double(out) * out_byte * (passes - 1) +
           planes * tiles * double(in) * byte_of(4 * s.spectra(in, block_of(in))) * double(pieces_of(out, plan.outs));
  }
  double seconds(const FrequencyGradientPlan& plan) const {
    const FrequencyGeometry& g = plan.g;
    const FrequencySizes s = plan.sizes();
    const double tiles = double(g.all_rows * g.columns);
    const double planes = 4 * double(g.planes());
    const double goes = double(pieces_of(g.all_rows, plan.rows));
    const double x_times = double(pieces_of(out_padded_, plan.outs));
    const double grad_times = plan.rows < g.all_rows ? double(pieces_of(in_padded_, plan.ins)) : 1;
    const double x_read = double(pieces_of(out_padded_, plan.part_outs));
    const double grad_read = double(pieces_of(in_padded_, plan.part_ins));
    const double x_byte = byte_of(4 * s.spectra(plan.ins, block_of(plan.ins)));
    const double grad_byte = byte_of(4 * s.spectra(plan.outs, block_of(plan.outs)));
    return map_transforms(g, in_padded_, c_.point) * x_times + map_transforms(g, out_padded_, c_.point) * grad_times +
           weight_transforms(g, 1.5 * taps_) + weight_transforms(g, 0) * (goes - 1) +
           product(g, double(in_padded_), double(out_padded_), tiles, tiles / goes, double(plan.part_outs)) +
           planes * tiles * (double(in_padded_) * x_read * x_byte + double(out_padded_) * grad_read * grad_byte);
  }

  const ConvProblem& p_;
  const FrequencyCosts c_ = frequency_costs();
  const int64_t limit_, in_padded_, out_padded_, terms_;
  double taps_;
};

}  // namespace
}  // namespace nasdet
