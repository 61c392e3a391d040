// The convolution in the frequency domain: what its kernels are given. Maps are cut into overlapping T x T tiles, whose
// spectra are multiplied with those of the taps: per frequency a matrix product over the channels.
//
// A spectrum is a row of planes. Three planes hold a complex frequency, ready for Gauss's product of three real ones; the
// last four planes are the frequencies that are real. A plane of a map's spectrum is a matrix [tile][channel], one of the
// weights' spectrum [in][out] in panels. All channels are padded with zeros to whole vectors.
#pragma once
#include "nasdet/isa.h"

#include <cstdint>

namespace nasdet {

// Tiles of an NHWC map. Tile (n, i, j) starts at row i * step_h - margin_h and column j * step_w - margin_w, and ends a
// margin after its step.
struct FrequencyTiles {
  int64_t height, width, channels;
  int32_t rows, columns;        // tiles of one image
  int32_t step_h, step_w;
  int32_t margin_h, margin_w;
  bool inner;                   // only the step is read or written, not the margins
  int64_t first_tile, tiles;    // those in hand
};

// Planes of some channels of some tiles: [plane][tile][channel].
struct FrequencyPlanes {
  float* data;
  int64_t plane;                // elements from one plane to the next
  int64_t channels;             // a multiple of the lanes
  int64_t first_channel;        // of the map
  bool streaming;               // too large for the caches: store past them
};

// Which three combinations of re and im stand for a complex frequency: of a map as a factor, re + im, re and im; of a
// gradient that is a conjugated one, re, re + im and re - im.
enum class FrequencyForm : int { kFactor, kConjugateFactor };

// A convolution's outputs [first, last) and its taps at (i - 1) * dilation from the centre of a grid.
struct FrequencyBranch {
  int64_t first, last;
  int32_t dilation_h, dilation_w;
  const float* weight;          // [last - first][in][3][3]
  const float* mix;             // null: 1
  float* weight_grad;           // null: not wanted
  float* mix_grad_part;         // [blocks of in-channels][last - first] sums over a block; null: not wanted
};

// The weights between some input and some output channels. Half-way to their spectrum, or back, lie the transforms of
// the taps' rows: [depth][vector of the width], of which each step has some columns. For the map's gradient the depth
// counts outputs and the width inputs, else the other way round.
struct FrequencyWeights {
  const FrequencyBranch* branches;
  int64_t branch_count, in_channels, out_channels;
  int32_t radius_h;             // rows of taps above and below the centre
  int64_t first_in, ins, first_out, outs;  // the chunk; firsts are multiples of the lanes
  bool transposed;              // for the map's gradient
  float* halves;                // frequency_half elements for each lane
  float* grids;                 // 2 x lanes x lanes x (grid area) elements of scratch for each call
};

// Some columns of the half spectra of `depth` rows of a chunk's weights as planes: [plane of the step][depth][width], in
// panels of the width.
struct FrequencyStep {
  int step;
  float* planes;
  int64_t plane;
  int64_t first, depth;         // rows of the halves
  bool add;                     // to the halves, of gradients
};

// c = a b (+ c) for every plane.
struct FrequencyProduct {
  const float *a, *b;
  float* c;
  int64_t a_plane, b_plane, c_plane;
  int64_t a_row, a_step, c_row;  // elements from row to row, and from term to term of the sum
  int64_t b_step;                // 0: in panels, each [depth][width]
  int64_t rows, columns, depth;  // columns is a multiple of the lanes
  bool add;
};

// Tiles and tap grids that kernels exist for. A grid holds the taps' rows and columns.
constexpr int kFrequencyTiles[] = {16, 20, 24, 32};
constexpr int kFrequencyGrids[] = {7, 11, 29};  // the last for tiles of 32 only

constexpr int64_t frequency_bins(int64_t tile) { return (tile / 2 - 1) * (tile + 2); }  // complex ones
constexpr int64_t frequency_planes(int64_t tile) { return 3 * frequency_bins(tile) + 4; }

// The planes are worked on in steps: a column of complex frequencies in each, the last has the two real columns.
constexpr int64_t frequency_steps(int64_t tile) { return tile / 2; }
constexpr int64_t frequency_step_first(int64_t tile, int64_t step) { return 3 * tile * step; }
constexpr int64_t frequency_step_planes(int64_t tile, int64_t step) { return step < tile / 2 - 1 ? 3 * tile : 3 * (tile - 2) + 4; }

// Elements for each lane of the transforms of a grid's rows.
constexpr int64_t frequency_half(int64_t tile, int64_t grid) { return (tile / 2 + 1) * 4 * (grid / 2 + 1); }

}  // namespace nasdet

// Ranges count tiles x vectors of channels (the latter fastest); of weights, vectors of outs x vectors of ins; planes.
NASDET_DECLARE_KERNEL(void, frequency_spectra, int tile, const FrequencyTiles&, const FrequencyPlanes&, const float* map, FrequencyForm, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_maps, int tile, const FrequencyTiles&, const FrequencyPlanes&, float* map, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_add_maps, int tile, const FrequencyTiles&, const FrequencyPlanes&, float* map, int phase, int phases, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_weights, int tile, int grid, const FrequencyWeights&, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_weight_planes, int tile, int grid, const FrequencyWeights&, const FrequencyStep&)
NASDET_DECLARE_KERNEL(void, frequency_weight_planes_back, int tile, int grid, const FrequencyWeights&, const FrequencyStep&)
NASDET_DECLARE_KERNEL(void, frequency_weight_gradients, int tile, int grid, const FrequencyWeights&, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_multiply, const FrequencyProduct&, int64_t begin, int64_t end)
