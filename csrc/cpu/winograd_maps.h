// What all kernels of Winograd's convolution share: the kernels' taps, and the transforms of a map's tiles with their edges.
#pragma once
#include "winograd_short.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int W = kLanes<float>;
constexpr int64_t kLine = 64 / sizeof(float);  // floats of a cache line
constexpr bool kPartOfLine = W < kLine;

// The kernels of a vector of y's channels and of W input channels from `c` on: taps[(c * 9 + tap)] over y's channels, with
// zeros for what is not there.
NASDET_INLINE void load_taps(const WinogradChannels& y, int64_t in_channels, int64_t c, bool mixed, Vector* taps) {
  const int64_t length = (in_channels - c < W ? in_channels - c : W) * 9;
  for (int q = 0; q < 9; ++q) {
    Vector* const rows = taps + q * W;
    for (int64_t o = 0; o < W; ++o)
      rows[o] = o < y.count ? load_up_to(y.weight + (o * in_channels + c) * 9 + q * W, length - q * W) : Vector{};
    transpose(rows);
  }
  if (!mixed || y.mix == nullptr) return;
  const Vector factor = load_up_to(y.mix, y.count);
  for (int i = 0; i < 9 * W; ++i) taps[i] *= factor;
}

// The taps of the W terms of vector `d` of `deep`, for vector `v` of `wide`: term k's are from taps[k * term] on, `step` apart.
struct TermTaps {
  Vector taps[9 * W];
  int64_t term, step;

  NASDET_INLINE void load(const WinogradProduct& p, int64_t v, int64_t d) {
    term = p.transposed ? 1 : 9, step = p.transposed ? W : 1;
    if (!p.transposed) return load_taps(p.wide.vectors[v], p.in_channels, p.deep.vectors[d].first, true, taps);
    Vector kernels[9 * W];
    load_taps(p.deep.vectors[d], p.in_channels, p.wide.vectors[v].first, true, kernels);
    for (int tap = 0; tap < 9; ++tap) {
      Vector* const square = taps + (8 - tap) * W;
      for (int c = 0; c < W; ++c) square[c] = kernels[c * 9 + tap];
      transpose(square);
    }
  }
};

struct Span { int64_t begin, end; };

// Which of `count` pixels from `start` on, a dilation apart, are inside of a map of `size`.
NASDET_INLINE Span inside(int64_t start, int64_t dilation, int64_t size, int64_t count) {
  Span s{0, count};
  if (start < 0) s.begin = 1;  // only the first can be: tiles start inside
  if (start + (count - 1) * dilation >= size) s.end = start >= size ? 0 : (size - start + dilation - 1) / dilation;
  return s;
}

// Tiles in the domain: [planes][rows][vectors], `row` and `plane` floats apart.
struct Domain {
  float* data;
  int64_t row, plane;
};

// A tile's pixels from (row, column) on.
struct TilePixels {
  const float* start;
  int64_t down, right;
  Span rows, columns;  // inside of the map

  NASDET_INLINE Vector at(int64_t r, int64_t c, const WinogradChannels& channels) const {
    return load_up_to(start + r * down + c * right + channels.first, channels.count);
  }
  NASDET_INLINE bool inside(int64_t r, int64_t c) const {
    return r >= rows.begin && r < rows.end && c >= columns.begin && c < columns.end;
  }
};

// Half a cache line is read of every pixel at a time, from places that are too many for the caches' own guesses: the next line of
// each of `count` is asked for with the first half. Vectors of a whole line were not measured, and ask for nothing.
template <class Place> NASDET_INLINE void ask_for_next_lines(int64_t vector, int count, const Place& place) {
  if (!kPartOfLine || vector % (kLine / W) != 0) return;
#pragma GCC unroll 36
  for (int i = 0; i < count; ++i) __builtin_prefetch(place(i) + kLine, 0, 3);
}

// What is read for a pixel outside of the map, where it has so many channels at most.
constexpr int64_t kZeros = 2048;
alignas(64) constexpr float kZeroPixel[kZeros] = {};

// Where each pixel of a tile at the map's edge is read.
template <int kSize> struct EdgePixels {
  const TilePixels& pixels;
  const float* places[kSize * kSize];

  explicit EdgePixels(const TilePixels& of) : pixels(of) {
    for (int r = 0; r < kSize; ++r)
      for (int c = 0; c < kSize; ++c)
        places[r * kSize + c] = pixels.inside(r, c) ? pixels.start + r * pixels.down + c * pixels.right : kZeroPixel;
  }
  // f(get), of vector `v` of the channels: get(row, column).
  template <class F> NASDET_INLINE void with_vector(const WinogradChannels& channels, int64_t v, const F& f) const {
    ask_for_next_lines(v, kSize * kSize, [&](int i) { return places[i] + channels.first; });
    if (channels.count == W && channels.first + W <= kZeros)
      f([&](int r, int c) { return load(places[r * kSize + c] + channels.first); });
    else f([&](int r, int c) { return pixels.inside(r, c) ? pixels.at(r, c, channels) : Vector{}; });
  }
};

// All vectors of a tile that is not whole, transformed by Line.
template <class Line>
__attribute__((noinline)) void transform_short_tile(const WinogradSide& side, const WinogradTile& tile,
                                                    const TilePixels& pixels, const Domain& to,
                                                    const WinogradRows& at) {
  const EdgePixels<Line::from(4)> edge(pixels);
  float* rows[kWinogradPlanes];
  for (int64_t plane = 0; plane < kWinogradPlanes; ++plane)
    rows[plane] = to.data + plane * to.plane + at.of(plane) * to.row;
  for (int64_t v = 0; v < side.count; ++v)
    edge.with_vector(side.vectors[v], v, [&](const auto& get) {
      transform_sides<Line>(tile.rows, tile.columns, get,
                            [&](int r, int c, Vector value) { store(rows[r * kWinogradPoints + c] + v * W, value); });
    });
}

// Vectors of a whole tile at the map's edge, or from one that is not full on.
template <class Line>
__attribute__((noinline)) void transform_edge_tile(const WinogradChannels* vectors, int64_t count,
                                                   const TilePixels& pixels, float* out, int64_t plane) {
  const EdgePixels<Line::from(4)> edge(pixels);
  for (int64_t v = 0; v < count; ++v, out += W)
    edge.with_vector(vectors[v], v, [&](const auto& get) { Line::whole(get, out, plane); });
}

// A tile's pixels from (row, column) on, transformed by Line, for all vectors of the side. Its rows in the planes are `at`.
template <class Line, class Job>
NASDET_INLINE void transform_tile(const Job& job, const WinogradSide& side, const WinogradTile& tile, int64_t row,
                                  int64_t column, const Domain& to, const WinogradRows& at) {
  const int64_t pixel = side.pixel;
  const TilePixels pixels{side.map + ((tile.image * job.height + row) * job.width + column) * pixel,
                          job.dilation_h * job.width * pixel, job.dilation_w * pixel,
                          inside(row, job.dilation_h, job.height, Line::from(tile.rows)),
                          inside(column, job.dilation_w, job.width, Line::from(tile.columns))};
  if (!tile.whole()) return transform_short_tile<Line>(side, tile, pixels, to, at);
  const Span rows = pixels.rows, columns = pixels.columns;
  constexpr int kSize = Line::from(4);
  const bool all = rows.begin == 0 && columns.begin == 0 && rows.end == kSize && columns.end == kSize;
  float* const out = to.data + at.whole * to.row;
  int64_t full = 0;
  for (; all && full < side.count && side.vectors[full].count == W; ++full) {
    const float* const p = pixels.start + side.vectors[full].first;
    ask_for_next_lines(full, kSize * kSize,
                       [&](int i) { return p + i / kSize * pixels.down + i % kSize * pixels.right; });
    Line::whole([&](int r, int c) { return load(p + r * pixels.down + c * pixels.right); }, out + full * W, to.plane);
  }
  if (full < side.count)
    transform_edge_tile<Line>(side.vectors + full, side.count - full, pixels, out + full * W, to.plane);
}

template <class Job>
NASDET_INLINE void transform_inputs(const Job& job, const WinogradSide& side, const WinogradTile& tile,
                                    const Domain& to, const WinogradRows& at) {
  transform_tile<InputLine>(job, side, tile, tile.row - job.dilation_h, tile.column - job.dilation_w, to, at);
}

// Where a tile's outputs go.
struct TileOutputs {
  float* start;
  int64_t down, right;
  WinogradWrite write;

  NASDET_INLINE void put(int64_t r, int64_t c, const WinogradChannels& channels, Vector value) const {
    float* const to = start + r * down + c * right + channels.first;
    store_up_to(to, write == WinogradWrite::add ? value + load_up_to(to, channels.count) : value, channels.count);
  }
};

// A whole tile's outputs for a full vector of channels.
template <WinogradWrite kWrite>
NASDET_INLINE void write_full(const float* from, int64_t plane, const TileOutputs& outputs, int64_t channel) {
  transform_output(from, plane, [&](int r, int c, Vector value) {
    float* const to = outputs.start + r * outputs.down + c * outputs.right + channel;
    if constexpr (kWrite == WinogradWrite::stream) store_streaming(to, value);
    else store(to, kWrite == WinogradWrite::add ? value + load(to) : value);
  });
}

// The vectors from `vectors` on of a tile that is not whole.
__attribute__((noinline)) void write_short_tile(const WinogradChannels* vectors, int64_t count,
                                                const WinogradTile& tile, const TileOutputs& outputs,
                                                const Domain& from, const WinogradRows& at) {
  for (int64_t v = 0; v < count; ++v)
    transform_sides<OutputLine>(
        tile.rows, tile.columns,
        [&](int r, int c) {
          const int64_t plane = r * kWinogradPoints + c;
          return load(from.data + plane * from.plane + at.of(plane) * from.row + v * W);
        },
        [&](int r, int c, Vector value) { outputs.put(r, c, vectors[v], value); });
}

NASDET_INLINE TileOutputs outputs_of(const WinogradProduct& p, const WinogradTile& tile) {
  const int64_t pixel = p.wide.pixel;
  return {p.out + ((int64_t(tile.image) * p.height + tile.row) * p.width + tile.column) * pixel,
          p.dilation_h * p.width * pixel, p.dilation_w * pixel, p.write};
}

// While the products of one plane run: its share of the pixels that `count` tiles will write, for the vectors of a go.
NASDET_INLINE void ask_for_outputs(const WinogradProduct& p, const WinogradPanel& go, const WinogradTile* tiles,
                                   int64_t count, int64_t plane) {
  constexpr int64_t kPixels = 16;
  if (!kPartOfLine || p.write == WinogradWrite::stream) return;
  const int64_t end = count * kPixels * (plane + 1) / kWinogradPlanes;
  for (int64_t i = count * kPixels * plane / kWinogradPlanes; i < end; ++i) {
    const WinogradTile& tile = tiles[i / kPixels];
    const int64_t r = i % kPixels / 4, c = i % 4;
    if (r >= tile.rows || c >= tile.columns) continue;
    const TileOutputs outputs = outputs_of(p, tile);
    const float* const pixel = outputs.start + r * outputs.down + c * outputs.right + p.wide.vectors[go.first].first;
    for (int64_t k = 0; k < go.count * W; k += kLine) __builtin_prefetch(pixel + k, 0, 3);
  }
}

// A tile's outputs, for vectors that lie side by side.
NASDET_INLINE void write_tile(const WinogradProduct& p, const WinogradPanel& panel, const WinogradTile& tile,
                              const Domain& from, const WinogradRows& at) {
  const TileOutputs outputs = outputs_of(p, tile);
  const WinogradChannels* const vectors = p.wide.vectors + panel.first;
  if (!tile.whole()) return write_short_tile(vectors, panel.count, tile, outputs, from, at);
  for (int64_t v = 0; v < panel.count; ++v) {
    const WinogradChannels& channels = vectors[v];
    const float* const sums = from.data + at.whole * from.row + v * W;
    if (channels.count < W)
      transform_output(sums, from.plane, [&](int r, int c, Vector value) { outputs.put(r, c, channels, value); });
    else if (p.write == WinogradWrite::add) write_full<WinogradWrite::add>(sums, from.plane, outputs, channels.first);
    else if (p.write == WinogradWrite::stream && channels.first % W == 0)
      write_full<WinogradWrite::stream>(sums, from.plane, outputs, channels.first);
    else write_full<WinogradWrite::store>(sums, from.plane, outputs, channels.first);
  }
}

// The outputs of `count` tiles, for vectors that lie side by side.
NASDET_INLINE void write_tiles(const WinogradProduct& p, const WinogradPanel& panel, const WinogradTile* tiles,
                               int64_t count, const Domain& from) {
  WinogradRows{}.for_tiles(
      tiles, count, [&](const WinogradTile& tile, const WinogradRows& at) { write_tile(p, panel, tile, from, at); });
  if (p.write == WinogradWrite::stream) streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
