// What the depthwise convolution hands across the instruction-set boundary.
//
// Forward and data gradient are one thing: every target is a sum over taps of a source. The target is the result and the
// source the input in the forward; the other way round in the data gradient.
#pragma once
#include <cstdint>

namespace nasdet {

constexpr int64_t kDepthwiseKernel = 255;  // the largest kernel
constexpr int kDepthwiseRows = 7;          // rows of a tile, at most

// A lattice along one axis: targets first + step * j, j < count, read the source at advance * j + base[t], t < taps.
// `base` is monotonic; step or advance is 1.
struct DepthwiseAxis {
  int64_t first, step, count, advance, taps, source;
  const int32_t* tap;          // [taps] where the weight stands in the kernel
  const int64_t* base;         // [taps]
  const int32_t *begin, *end;  // [count] the taps of j whose source exists

  // The targets j whose source by tap t exists: from first_of(t), below last_of(t).
  int64_t first_of(int64_t t) const { return base[t] >= 0 ? 0 : (advance - 1 - base[t]) / advance; }
  int64_t last_of(int64_t t) const {
    const int64_t most = base[t] < source ? (source - 1 - base[t]) / advance + 1 : 0;
    return most < count ? most : count;
  }
};

// Rows first + r * spacing, r < rows (7, 4 or 1), of a lattice. With step 1 or 2 they share source rows, `unit` apart: row r + 1
// reads those of r from tap `step` on. With step 0 they do not.
struct DepthwiseTile {
  const DepthwiseAxis* axis;
  int64_t first, rows, spacing, step, unit;
};

struct DepthwiseMap { int64_t channels, height, width; };

// NHWC: lanes are channels. `weights` in the type of the arithmetic, [kernel * kernel][channels].
struct DepthwisePixels {
  int storage;
  const void *source, *weights;
  const void* zeros;  // a row of the source's width
  void* target;
  DepthwiseMap from, to;
  int64_t kernel;
  const DepthwiseAxis* columns;
  int64_t column_lattices;
  bool streaming;
};

// NCHW: lanes are columns. `weights` in the type of the arithmetic, [channels][kernel * kernel].
struct DepthwisePlanes {
  int storage;
  const void *source, *weights;
  void* target;
  DepthwiseMap from, to;
  int64_t kernel;
  const DepthwiseAxis* columns;
  int64_t column_lattices;
  const DepthwiseTile* tiles;
  int64_t tile_count;
  int64_t margin;     // zeros to the left of a row's copy: no tap reads further
  int64_t ring, row;  // rows that are kept as copies, and the elements of one, all phases
};

// The weights' gradient: `from` is the input, `grad` is laid out like the forward's target.
struct DepthwiseGrad {
  int storage;
  const void *source, *grad, *zeros;
  DepthwiseMap from, to;
  int64_t kernel;
  const DepthwiseAxis* columns;  // of the forward: one lattice
  const DepthwiseTile* tiles;
  int64_t tile_count;
  int64_t margin, ring, row;  // planes
};

}  // namespace nasdet
