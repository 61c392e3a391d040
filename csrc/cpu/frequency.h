// The convolution in the frequency domain: what its kernels are given. Maps are cut into overlapping T x T tiles, whose
// spectra are multiplied with those of the taps: per frequency a matrix product over the channels.
//
// A spectrum is a row of T * T planes: two for each complex frequency, its real and its imaginary part; the last four are
// the frequencies that are real. A plane of a map's spectrum is a matrix [tile][channel], one of the weights' [in][out] in
// panels. All channels are padded with zeros to whole vectors.
#pragma once
#include "nasdet/isa.h"

#include <cstdint>

namespace nasdet {

// Tiles of an NHWC map. Tile (n, i, j) starts at row i * step_h - margin_h and column j * step_w - margin_w, and ends a
// margin after its step.
struct FrequencyTiles {
  int64_t height, width, channels;
  int32_t rows, columns;  // tiles of one image
  int32_t step_h, step_w;
  int32_t margin_h, margin_w;
  bool inner;                 // only the step is read or written, not the margins
  int64_t first_tile, tiles;  // those in hand
  bool streaming;             // a map is written past the caches
};

// Planes of some channels of some tiles, by blocks of channels: [block][plane][tile][channel of the block].
struct FrequencyPlanes {
  float* data;
  int64_t plane;          // elements from one plane of a block to the next
  int64_t block;          // channels, a multiple of the lanes
  int64_t channels;       // a multiple of the lanes
  int64_t first_channel;  // of the map
  bool streaming;         // too large for the caches: store past them
};

// A convolution's outputs [first, last).
struct FrequencyBranch {
  int64_t first, last;
  const float* weight;   // [last - first][in][3][3]
  const float* mix;      // null: 1
  float* weight_grad;    // null: not wanted
  float* mix_grad_part;  // [blocks of in-channels][last - first] sums over a block; null: not wanted
  int32_t terms[9];      // of its taps, folded: those of (0, 0), (0, x), (y, 0) and (y, x)
};

// Taps folded about the centre of their grid: for each place (y, x >= 0) that any branch has a tap at, what is even or odd in
// y, and in x, of the taps at (+-y, +-x). Those are terms of sums: for each parity, and row y of it, the terms of its places.
struct FrequencyPlace {
  int32_t y, x;
  int32_t term[4];  // even in both; odd in x; odd in y; odd in both. -1 where there is no such part
};
struct FrequencyFold {
  const FrequencyPlace* places;
  int64_t place_count;
  const int32_t* ends;  // [parity][y up to the grid's radius]: where the terms of a row end
  int64_t terms;
};

// The weights between some input and some output channels, folded: [depth][vector of the width][term]. For the map's
// gradient the depth counts outputs and the width inputs, else the other way round.
struct FrequencyWeights {
  const FrequencyBranch* branches;
  int64_t branch_count, in_channels, out_channels;
  FrequencyFold fold;
  int64_t first_in, ins, first_out, outs;  // the chunk; firsts are multiples of the lanes
  bool transposed;                         // for the map's gradient
  float* folded;
};

// Some columns of the spectra of `depth` rows of a chunk's weights as planes: [plane of the step][depth][width], in panels of
// the width; of gradients without panels.
struct FrequencyStep {
  int step;
  float* planes;         // frequency_step_plane elements apart
  int64_t first, depth;  // rows of the folded weights
  bool add;              // to the folded gradients
};

// c = a b (+ c) for some frequencies, `complex` complex ones and after them `real` real ones: maps times weights.
struct FrequencyProduct {
  const float *a, *b;
  float* c;
  int64_t a_plane, b_plane, c_plane;
  int64_t a_row, c_row;          // elements from tile to tile
  int64_t rows, columns, depth;  // columns is a multiple of the lanes
  int64_t complex, real;
  bool add;
  bool fetch_c;   // it is expected to lie outside the inner cache, as a does
  float* packed;  // rows x depth elements of scratch, the latter padded to whole vectors
};

// c = transposed(a) conj(b): of a map and a gradient over the same tiles, the latter in blocks.
struct FrequencyGradientProduct {
  const float *a, *b;
  float* c;
  int64_t a_plane, b_plane, b_block, c_plane;
  int64_t a_row, b_row;  // elements from tile to tile
  int64_t rows, columns, tiles;
  int64_t complex, real;
  float* packed;  // tiles x (rows + 2 columns) elements of scratch, each padded to whole vectors
};

// Tiles and tap grids that kernels exist for. A grid holds the taps' rows and columns.
constexpr int kFrequencyTiles[] = {16, 20, 24, 32};
constexpr int kFrequencyGrids[] = {7, 11, 29};  // the last for tiles of 32 only

constexpr int64_t frequency_bins(int64_t tile) { return (tile / 2 - 1) * (tile + 2); }  // complex ones
constexpr int64_t frequency_planes(int64_t tile) { return tile * tile; }

// The planes are worked on in steps: a column of complex frequencies in each, the last has the two real columns.
constexpr int64_t frequency_steps(int64_t tile) { return tile / 2; }
constexpr int64_t frequency_step_complex(int64_t tile, int64_t step) { return step < tile / 2 - 1 ? tile : tile - 2; }
constexpr int64_t frequency_step_real(int64_t tile, int64_t step) { return step < tile / 2 - 1 ? 0 : 4; }
constexpr int64_t frequency_step_planes(int64_t tile) { return 2 * tile; }

// Channels between which products are made at once: outputs in a panel of the widest vectors, or in two of narrower ones,
// and inputs, whose weights' planes of a step stay in the inner cache. Spectra lie in blocks of so many channels.
constexpr int64_t kFrequencyBlock = 32;
constexpr int64_t frequency_most_outs(int lanes) { return 4 * lanes; }
// From plane to plane of a step: an odd number of cache lines, and known to the compiler, for to compute the addresses took up to a
// quarter of a transform.
constexpr int64_t frequency_step_plane(int lanes) { return kFrequencyBlock * frequency_most_outs(lanes) + 16; }

}  // namespace nasdet

// Ranges count tiles x vectors of channels (the latter fastest); of weights, vectors of outs x vectors of ins.
NASDET_DECLARE_KERNEL(void, frequency_spectra, int tile, const FrequencyTiles&, const FrequencyPlanes&,
                      const float* map, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_maps, int tile, const FrequencyTiles&, const FrequencyPlanes&, float* map,
                      int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_weights, int tile, const FrequencyWeights&, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, frequency_weight_planes, int tile, int grid, const FrequencyWeights&, const FrequencyStep&)
NASDET_DECLARE_KERNEL(void, frequency_weight_planes_back, int tile, int grid, const FrequencyWeights&,
                      const FrequencyStep&)
NASDET_DECLARE_KERNEL(void, frequency_weight_gradients, int tile, const FrequencyWeights&)
NASDET_DECLARE_KERNEL(void, frequency_multiply, const FrequencyProduct&)
NASDET_DECLARE_KERNEL(void, frequency_multiply_gradients, const FrequencyGradientProduct&)
