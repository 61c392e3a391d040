// How a convolution in the frequency domain is cut into pieces: which tiles, and how many channels at once, so that the
// scratch stays within its limit and the least time is expected. All of it follows from the problem and the limit alone.
#pragma once
#include <algorithm>
#include <cstdint>

#include "conv.h"
#include "frequency.h"
#include "scratch.h"

namespace nasdet {
namespace {

constexpr int64_t kFrequencyCached = 5 << 20;  // bytes of a spectrum up to which it is expected to stay in the caches

// What was measured on one core, in seconds.
struct FrequencyCosts {
  int lanes, panel;
  double flop;                      // of the matrix products at their best
  double stored_terms, added_terms;  // terms of a sum that it costs to store it, or to read and store it
  double cached_byte, byte;         // to read from the outer cache, and from memory
  double point, point_back;         // of a transform of one vector of channels, for each of T * T points
  double tap_point, tap;            // of the transform of a vector of weights, and of gathering one of its taps
};

inline FrequencyCosts frequency_costs() {
#ifdef NASDET_X86
  if (cpu_capability() >= Isa::avx512) return {16, 64, 1 / 112e9, 1, 3.2, 1 / 110e9, 1 / 35e9, 9e-9, 1.15e-8, 3.1e-9, 8e-9};
#endif
  return {8, 16, 1 / 112e9, 1, 3.2, 1 / 110e9, 1 / 35e9, 8.5e-9, 9e-9, 2e-9, 3e-9};
}

inline int64_t padded_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Elements from plane to plane: an odd number of cache lines, so that planes side by side use all sets of a cache.
inline int64_t plane_stride(int64_t elements) { return (padded_to(elements, 16) / 16 | 1) * 16; }

// The tiles of a problem.
struct FrequencyGeometry {
  int tile, grid;
  int32_t radius_h, radius_w, step_h, step_w;
  int64_t rows, columns, all_rows;  // of one image, and rows of all

  int64_t planes() const { return frequency_planes(tile); }
  FrequencyTiles tiles(const ConvProblem& p, int64_t channels, bool with_margin, int64_t first_row, int64_t row_count) const {
    return {p.height, p.width, channels, int32_t(rows), int32_t(columns), step_h, step_w, radius_h, radius_w, !with_margin, first_row * columns, row_count * columns};
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
  g.rows = (p.height + g.step_h - 1) / g.step_h, g.columns = (p.width + g.step_w - 1) / g.step_w;
  g.all_rows = p.images * g.rows;
  return true;
}

// A convolution (forward, or of the gradient to the input): all inputs of some rows of tiles in hand at once, then
// outputs by `outs` and sums over inputs by `ins`.
struct FrequencyPlan {
  FrequencyGeometry g;
  int64_t rows, outs, ins;
  double seconds;
  int64_t bytes;
  int64_t map_plane(int64_t channels) const { return plane_stride(rows * g.columns * channels); }
  int64_t weight_plane() const { return plane_stride(outs * ins); }
};

// The gradient of the weights: spectra of `ins` and `outs` channels of some rows of tiles in hand, of which products of
// part_ins x part_outs are made at once.
struct FrequencyGradientPlan {
  FrequencyGeometry g;
  int64_t rows, outs, ins, part_outs, part_ins;
  double seconds;
  int64_t bytes;
  int64_t map_plane(int64_t channels) const { return plane_stride(rows * g.columns * channels); }
  int64_t part_plane() const { return plane_stride(part_outs * part_ins); }
};

class FrequencyPlanner {
 public:
  explicit FrequencyPlanner(const ConvProblem& p) : p_(p), limit_(scratch_limit()), taps_(0) {
    for (const ConvBranch& b : p.branches) taps_ += 9 * double(b.last - b.first) / double(p.out_channels);
  }

  // From `in` to `out` channels; the gradient to the input has them the other way round.
  FrequencyPlan convolution(int64_t in, int64_t out) const {
    FrequencyPlan best{};
    const int64_t out_padded = padded_to(out, c_.lanes), in_padded = padded_to(in, c_.lanes);
    for (int tile : kFrequencyTiles) {
      FrequencyPlan plan{};
      if (!frequency_geometry(p_, tile, plan.g)) continue;
      for (int64_t outs : kChunks) {
        plan.outs = std::min(outs, out_padded);
        for (int64_t ins : kChunks) {
          plan.ins = std::min(ins, in_padded);
          for (int64_t parts = 1;; parts = parts + (parts + 3) / 4) {
            plan.rows = (plan.g.all_rows + parts - 1) / parts;
            plan.bytes = bytes(plan.g, {plan.map_plane(in_padded), plan.map_plane(plan.outs), plan.weight_plane()});
            if (plan.bytes <= limit_ || plan.rows == 1) break;
          }
          plan.seconds = seconds(plan, in, in_padded, out_padded);
          if (better(plan, best)) best = plan;
          if (plan.ins == in_padded) break;
        }
        if (plan.outs == out_padded) break;
      }
    }
    return best;
  }

  FrequencyGradientPlan gradient() const {
    FrequencyGradientPlan best{};
    const int64_t out_padded = padded_to(p_.out_channels, c_.lanes), in_padded = padded_to(p_.in_channels, c_.lanes);
    for (int tile : kFrequencyTiles) {
      FrequencyGradientPlan plan{};
      if (!frequency_geometry(p_, tile, plan.g)) continue;
      for (int64_t share = 1;; share *= 2) {  // of the channels in hand
        plan.ins = std::max<int64_t>(c_.lanes, padded_to((in_padded + share - 1) / share, c_.lanes));
        plan.outs = std::max<int64_t>(c_.lanes, padded_to((out_padded + share - 1) / share, std::min<int64_t>(64, out_padded)));
        const bool least = plan.ins == c_.lanes && plan.outs <= 64;
        for (int64_t part : {int64_t(16), int64_t(32), int64_t(64)}) {
          plan.part_ins = std::min(part, plan.ins), plan.part_outs = std::min<int64_t>(64, plan.outs);
          plan.rows = plan.g.all_rows;
          plan.bytes = gradient_bytes(plan);
          if (plan.bytes > limit_ && least) fewer_rows(plan);
          plan.seconds = seconds(plan, in_padded, out_padded);
          if (better(plan, best)) best = plan;
          if (plan.part_ins == plan.ins) break;
        }
        if (least) break;
      }
    }
    return best;
  }

 private:
  static constexpr int64_t kChunks[] = {16, 32, 64, 128, 256, 512, int64_t(1) << 40};

  // Within the limit if any is, then the faster; else the smaller.
  template <class Plan> bool better(const Plan& a, const Plan& b) const {
    if (b.bytes == 0) return true;
    const bool fits = a.bytes <= limit_, other_fits = b.bytes <= limit_;
    return fits != other_fits ? fits : fits ? a.seconds < b.seconds : a.bytes < b.bytes;
  }

  int64_t bytes(const FrequencyGeometry& g, std::initializer_list<int64_t> planes) const {
    int64_t total = grid_bytes(g);
    for (int64_t plane : planes) total += int64_t(Scratch::padded(size_t(g.planes() * plane) * 4));
    return total;
  }
  int64_t grid_bytes(const FrequencyGeometry& g) const { return 2 * c_.lanes * c_.lanes * g.grid * g.grid * 4; }
  int64_t gradient_bytes(const FrequencyGradientPlan& plan) const {
    return bytes(plan.g, {plan.map_plane(plan.ins), plan.map_plane(plan.outs), plan.part_plane()});
  }

  // Sums over tiles in several goes: then all products of what is in hand are kept.
  void fewer_rows(FrequencyGradientPlan& plan) const {
    plan.part_ins = plan.ins, plan.part_outs = plan.outs;
    for (int64_t parts = 2; plan.bytes > limit_ && plan.rows > 1; parts = parts + (parts + 3) / 4) {
      plan.rows = (plan.g.all_rows + parts - 1) / parts;
      plan.bytes = gradient_bytes(plan);
    }
  }

  static int64_t pieces(int64_t all, int64_t part) { return (all + part - 1) / part; }

  // Of sums of `depth` terms, `piece` at a time. What does not stay in the caches is read again for each piece.
  double product(const FrequencyGeometry& g, double rows, double columns, double depth, double piece, double piece_columns) const {
    const bool add = piece < depth;
    const double vectors = std::min<double>(piece_columns, c_.panel) / c_.lanes, held = 4 * double(g.planes()) * (rows + piece) * piece_columns;
    const double narrow = c_.lanes < 16 || vectors > 2 ? 1 : 1.5;  // tiles of 12 rows have more to address
    double seconds = 2 * c_.flop * narrow * double(g.planes()) * rows * columns * depth * (1 + (add ? c_.added_terms : c_.stored_terms) / piece);
    if (add && held > 1.2 * double(kFrequencyCached)) seconds += c_.byte * 8 * double(g.planes()) * rows * columns * (depth / piece - 1);
    return seconds;
  }
  double byte_of(const FrequencyGeometry& g, int64_t plane) const { return 4 * g.planes() * plane > kFrequencyCached ? c_.byte : c_.cached_byte; }
  static double back(const FrequencyGeometry& g) { return g.tile > 24 ? 1.4 : 1; }  // half a spectrum of 32 x 32 outgrows the inner cache
  double map_transforms(const FrequencyGeometry& g, int64_t channels, double point) const {
    return point * g.tile * g.tile * double(g.all_rows * g.columns) * double(channels) / c_.lanes;
  }
  double weight_transforms(const FrequencyGeometry& g, int64_t in_channels, int64_t out_padded) const {
    const double vectors = double(in_channels) * double(out_padded) / c_.lanes;
    return vectors * (c_.tap_point * g.tile * g.tile * (1 + double(g.grid) / g.tile) + c_.tap * taps_);
  }

  double seconds(const FrequencyPlan& plan, int64_t in, int64_t in_padded, int64_t out_padded) const {
    const FrequencyGeometry& g = plan.g;
    const int64_t tiles = g.all_rows * g.columns, goes = pieces(g.all_rows, plan.rows);
    const bool kept = plan.outs == out_padded && plan.ins >= in;  // the weights' spectrum outlives the rows in hand
    const double weight_byte = byte_of(g, plan.weight_plane()), map_byte = byte_of(g, plan.map_plane(in_padded));
    const double unstreamed = c_.lanes < 16 && weight_byte > c_.cached_byte ? 2 * c_.byte : 0;  // read for the store, and stored
    return map_transforms(g, in_padded, c_.point) + map_transforms(g, out_padded, c_.point_back * back(g)) + weight_transforms(g, in, out_padded) * double(kept ? 1 : goes) +
           product(g, double(tiles) / double(goes), double(out_padded), double(in), double(std::min(in, plan.ins)), double(plan.outs)) * double(goes) +
           (weight_byte + unstreamed) * 4 * double(g.planes()) * double(in) * double(out_padded) * double(goes) +
           map_byte * 4 * double(g.planes()) * double(tiles) * double(in_padded) * double(pieces(out_padded, plan.outs));
  }
  double seconds(const FrequencyGradientPlan& plan, int64_t in_padded, int64_t out_padded) const {
    const FrequencyGeometry& g = plan.g;
    const int64_t tiles = g.all_rows * g.columns;
    const double x_times = double(pieces(out_padded, plan.outs)), grad_times = plan.rows < g.all_rows ? double(pieces(in_padded, plan.ins)) : 1;
    const double part_byte = byte_of(g, plan.part_plane()), grad_byte = byte_of(g, plan.map_plane(plan.outs));
    return map_transforms(g, in_padded, c_.point) * x_times + map_transforms(g, out_padded, c_.point) * grad_times + 1.6 * back(g) * weight_transforms(g, p_.in_channels, out_padded) +
           product(g, double(p_.in_channels), double(out_padded), double(tiles), double(plan.rows * g.columns), double(plan.part_outs)) +
           part_byte * 8 * double(g.planes()) * double(p_.in_channels) * double(out_padded) +
           grad_byte * 4 * double(g.planes()) * double(tiles) * double(out_padded) * double(pieces(in_padded, plan.part_ins));
  }

  const ConvProblem& p_;
  const FrequencyCosts c_ = frequency_costs();
  const int64_t limit_;
  double taps_;
};

}  // namespace
}  // namespace nasdet
