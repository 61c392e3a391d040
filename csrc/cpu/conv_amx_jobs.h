// What the direct convolution on matrix tiles hands across the instruction-set boundary.
#pragma once
#include "conv_direct_jobs.h"
#include "nasdet/isa.h"

namespace nasdet {

constexpr int64_t kTilePositions = 32;  // that a step of the kernels takes: two tiles of rows, or the terms of one

// A map copied for tiles: [block of 32 channels][image][plane][position][channel]. Plane (a, b) has the source's rows
// a + i * step_h and columns b + j * step_w. Positions number them row by row, `pitch` a row: zeros follow each row, and `lead`
// of them come first, as many as a tap reaches out. So a tap is the same distance between positions for every pixel.
struct TileCopy {
  ConvMap source;
  char* data;
  const ConvSpan* blocks;  // channel and count
  int64_t block_count, step_h, step_w, first_image, images;
  int64_t first_row, rows;         // of every plane; may begin above the source
  int64_t lead, pitch, positions;  // the last: of a plane, those of zeros behind it included
  int64_t most_images;             // that a block has room for

  int64_t planes() const { return step_h * step_w; }
  int64_t plane_bytes() const { return positions * kAmxRowBytes; }
  int64_t block_bytes() const { return most_images * planes() * plane_bytes(); }
};

// Target pixels of some rows of the lattice as sums over terms: `terms` has the distance in bytes of each.
struct TileSums {
  int64_t pitch;
  const int64_t* terms;
  int64_t term_count;
  ConvMap target;
  ConvLattice lattice;
  int64_t first_image, first_row, rows;
};

// The gradient of the output in chunks of rows, as tiles of 16 channels by 32 positions: [chunk][panel][2][step][tile].
struct TileChunks {
  ConvMap target;
  char* data;
  const ConvPanel* panels;
  int64_t panel_count, first_image, images, first_row, rows, chunk_rows, pitch, steps;

  int64_t of_image() const { return (rows + chunk_rows - 1) / chunk_rows; }
};

// Sums over the chunks of a band for one block of 32 input channels, one panel, and some taps:
// [tap][target channel][32 input channels], added to if this is not the `first` band.
struct TileGrad {
  const TileCopy* copy;
  const TileChunks* chunks;
  const char* pairs;    // [block][16 channels][parity][image][plane][two positions][channel][2]
  const int64_t* taps;  // distances in positions
  int64_t block, panel, first_tap, last_tap;
  float* sums;
  bool first;
};

}  // namespace nasdet

NASDET_DECLARE_TILE_KERNEL(bool, conv_amx_copy_row, const TileCopy&, int64_t index)
NASDET_DECLARE_TILE_KERNEL(void, conv_amx_pair_plane, const TileCopy&, char* pairs, int64_t index)
NASDET_DECLARE_TILE_KERNEL(bool, conv_amx_turn_chunk, const TileChunks&, const void* zeros, int64_t chunk)
NASDET_DECLARE_TILE_KERNEL(void, conv_amx_sums, const TileSums&, const ConvPanel&, const char* source, int64_t image,
                           int64_t first_block, int64_t last_block)
NASDET_DECLARE_TILE_KERNEL(void, conv_amx_grad, const TileGrad&)
NASDET_DECLARE_TILE_KERNEL(void, conv_amx_turn_sums, float* sums, int64_t taps, int64_t width, int64_t channels)
