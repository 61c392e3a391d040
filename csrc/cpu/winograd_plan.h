// What the launcher of Winograd's convolution hands its kernels. F(4x4, 3x3): an output tile of 4 x 4 pixels, each a
// dilation apart, comes from 6 x 6 input pixels; in the domain of 6 x 6 = 36 planes the convolution is a product of matrices.
#pragma once
#include "nasdet/amx.h"

namespace nasdet {

constexpr int kWinogradPoints = 6;
constexpr int64_t kWinogradPlanes = kWinogradPoints * kWinogradPoints;

// The first output pixel of a tile, and its rows and columns of outputs: m of them, 1 to 4, take the first m + 2 points of
// their side.
struct WinogradTile {
  int32_t image, row, column;
  int16_t rows, columns;

  NASDET_INLINE bool whole() const { return rows == 4 && columns == 4; }
  NASDET_INLINE bool has(int64_t plane) const {
    return plane / kWinogradPoints < rows + 2 && plane % kWinogradPoints < columns + 2;
  }
};

// Each plane's row of the next of some tiles: planes close up where a tile is not in them. Whole tiles come first, and have the
// same row in all planes.
struct WinogradRows {
  int64_t whole = 0, shorter[kWinogradPlanes] = {};

  NASDET_INLINE int64_t of(int64_t plane) const { return whole + shorter[plane]; }
  NASDET_INLINE void add(const WinogradTile& tile) {
    if (tile.whole()) ++whole;
    else
      for (int64_t plane = 0; plane < kWinogradPlanes; ++plane) shorter[plane] += tile.has(plane);
  }
  NASDET_INLINE void add(const WinogradTile* tiles, int64_t count) {
    for (int64_t i = 0; i < count; ++i) add(tiles[i]);
  }
  // Calls use(tile, rows) for each of `count` tiles, and adds it.
  template <class Use> NASDET_INLINE void for_tiles(const WinogradTile* tiles, int64_t count, const Use& use) {
    for (int64_t i = 0; i < count; add(tiles[i++])) use(tiles[i], *this);
  }
};

// Up to a vector of channels of one branch: the first of them in the map, and where their weights are (of y's side only).
struct WinogradChannels {
  int64_t first, count;
  const float* weight;  // [count][in_channels][3][3]
  const float* mix;     // [count], or null: all are 1
  float* weight_grad;   // null: not wanted
  float* mix_grad;      // null: not wanted
};

// Vectors that one matrix product computes side by side.
struct WinogradPanel { int64_t first, count; };

// One side of the convolution: a map, and those of its channels that take part, in vectors.
struct WinogradSide {
  const float* map;
  int64_t pixel;  // channels of the whole map
  const WinogradChannels* vectors;
  int64_t count;
};

// How results get to their map; by streaming past the caches, whole cache lines.
enum class WinogradWrite { store, stream, add };

// Outputs `wide` = inputs `deep` times the weights, for one dilation: y from x, or the gradient of x from that of y.
struct WinogradProduct {
  int64_t height, width, dilation_h, dilation_w;
  const WinogradTile* tiles;
  WinogradSide deep, wide;
  float* out;           // the map of `wide`
  int64_t in_channels;  // of the convolution
  int64_t depth;        // rows of the weights: all vectors of `deep` but for the end of the last one
  bool transposed;      // the gradient of x: `deep` are y's channels, and the kernel is flipped
  WinogradWrite write;
  const WinogradPanel* panels;
  int64_t panel_count, panels_of_go;             // the latter plane by plane, and then back to the map
  float* weights;                                // [planes][panel][depth][vectors of the panel]
  int64_t weight_plane, deep_plane, wide_plane;  // floats from plane to plane: of the weights, and of a chunk's scratch
};

// A product of few map tiles: of some vectors of `wide`, whose sums stay in a core's cache over all terms. Of a block of terms at a
// time the weights of kColumnVectors after kColumnVectors are made, for one use.
constexpr int64_t kColumnTerms = 64, kColumnVectors = 2;
constexpr int64_t column_weights(int64_t lanes) { return kColumnTerms * kColumnVectors * lanes; }
struct WinogradColumns {
  WinogradProduct product;
  int64_t tiles;
  float* inputs;  // of all tiles: [block of terms][plane][tile][kColumnTerms]; null: made block by block
  int64_t input_plane, input_block;  // floats
};

// The gradient of the weights of one dilation: x's tiles transposed times those of the gradient of y.
struct WinogradGradient {
  int64_t height, width, dilation_h, dilation_w;
  bool on_tiles;              // the sums are made on matrix tiles
  const WinogradTile* tiles;  // of the piece at hand
  int64_t tile_count;
  WinogradSide x, y;
  int64_t in_channels;    // of the convolution
  int64_t first_in, ins;  // those of x's vectors
  int64_t sum_rows;       // of a panel: ins, or more
  bool accumulate;        // not the first piece
  const WinogradPanel* panels;
  int64_t panel_count;
  float *x_tiles, *y_tiles;  // [planes][tiles][row of vectors]
  int64_t x_row, y_row;
  float* sums;  // [planes][panel][sum_rows][vectors of the panel]
  int64_t x_plane, y_plane, sum_plane;
};

// Three matrix tiles have the parts of floats.
// a block of 16 rows, and of 32 columns
constexpr int64_t kAmxRowBlock = 3 * kAmxTileBytes;
constexpr int64_t kAmxColumnBlock = 6 * kAmxTileBytes;
constexpr int64_t amx_tiles(int64_t sides) { return (sides + kAmxSide - 1) / kAmxSide; }

// A product on matrix tiles: chunks of map tiles by all weights, or all map tiles by weights that are made for them alone.
struct WinogradAmx {
  WinogradProduct product;
  int64_t tiles;            // of the map
  int64_t blocks, columns;  // of terms, and of 16 columns
  char* weights;            // [planes][panel of 32 columns][block][part][2 tiles]
  int64_t weight_plane;     // bytes
  char* inputs;             // of all map tiles: [block][plane][16 of them][part]
};

}  // namespace nasdet
