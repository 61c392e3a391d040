// What Winograd's convolution costs: a model fitted to one thread of Zen 4, on matrix tiles to one of Sapphire Rapids, whose
// vectors are 1.4 times as fast: in the time that they would take Zen 4's.
// Only for conv_winograd.cpp under NASDET_REGISTER.
#pragma once
#include <algorithm>

#include "conv.h"
#include "winograd_plan.h"

namespace nasdet {

// How many tiles of up to 4 pixels, a dilation apart, cover an axis.
inline int64_t winograd_axis_tiles(int64_t size, int64_t dilation) {
  const int64_t whole = size / (4 * dilation), rest = size - whole * 4 * dilation;
  return whole * dilation + std::min(rest, dilation);
}

// How many whole tiles have as many points as those of a map.
inline int64_t winograd_tile_count(const ConvProblem& p, int64_t dilation_h, int64_t dilation_w) {
  const int64_t rows = p.height + 2 * winograd_axis_tiles(p.height, dilation_h);
  const int64_t columns = p.width + 2 * winograd_axis_tiles(p.width, dilation_w);
  return (p.images * rows * columns + kWinogradPlanes - 1) / kWinogradPlanes;
}

// Seconds for the transforms: of a tile's vector of channels to and from the domain, and of a vector of kernels.
struct WinogradCost { double into, out_of, kernel; };

// Of some kernels, of products of `rate` per second; tiles are computed in multiples of `rows`, and in sums over them of `terms`.
struct WinogradRates {
  WinogradCost product, gradient;
  double rate;
  int64_t rows, terms;
};
inline constexpr WinogradRates kWinogradAvx2{{90e-9, 45e-9, 85e-9}, {130e-9, 40e-9, 135e-9}, 100e9, 1, 1},
    kWinogradAvx512{{125e-9, 60e-9, 110e-9}, {200e-9, 75e-9, 190e-9}, 100e9, 1, 1},
    kWinogradAmx{{280e-9, 180e-9, 280e-9}, {350e-9, 350e-9, 570e-9}, 215e9, kAmxSide, kAmxTerms};

// Seconds of one thread for the slices of one dilation that fill `vectors` vectors of channels.
inline double winograd_dilation_seconds(const ConvProblem& p, const WinogradRates& rates, int64_t tiles,
                                        int64_t vectors, int64_t lanes, bool backward, bool weight_wanted) {
  constexpr double kAdding = 40e-9, kOverhead = 5e-6;
  const double t = double(tiles);
  const double in = double((p.in_channels + lanes - 1) / lanes);
  const double out = double(vectors);
  const double kernels = double(p.in_channels) * out;
  const auto product = [&](int64_t unit) {
    return double((tiles + unit - 1) / unit * unit) * 72 * kernels * double(lanes) / rates.rate + kOverhead;
  };
  const WinogradCost &one = rates.product, &gradient = rates.gradient;
  if (!backward) return product(rates.rows) + t * (one.into * in + one.out_of * out) + one.kernel * kernels;
  const double of_x = product(rates.rows) + t * (one.into * out + (one.out_of + kAdding) * in) + one.kernel * kernels;
  const double of_weight =
      product(rates.terms) + t * (gradient.into * in + gradient.out_of * out) + gradient.kernel * kernels;
  return (p.input_grad ? of_x : 0) + (weight_wanted ? of_weight : 0);
}

}  // namespace nasdet
