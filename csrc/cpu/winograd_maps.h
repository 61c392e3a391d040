// What all kernels of Winograd's convolution share: the kernels' taps, and the transforms of a map's tiles with their edges.
#pragma once
#include "winograd_transforms.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int W = kLanes<float>;

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
    if (!p.transposed) return load_taps(p.wide.vectors[v], p.in_channels, d * W, true, taps);
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

// A tile's kSize x kSize pixels from (row, column) on, transformed by `transform`, for all vectors of the side.
template <int kSize, class Job, class Transform>
NASDET_INLINE void transform_tile(const Job& job, const WinogradSide& side, int64_t image, int64_t row, int64_t column,
                                  float* out, int64_t plane, Transform transform) {
  const int64_t pixel = side.pixel, down = job.dilation_h * job.width * pixel, right = job.dilation_w * pixel;
  const Span rows = inside(row, job.dilation_h, job.height, kSize),
             columns = inside(column, job.dilation_w, job.width, kSize);
  const float* const start = side.map + ((image * job.height + row) * job.width + column) * pixel;
  const bool whole = rows.begin == 0 && columns.begin == 0 && rows.end == kSize && columns.end == kSize;
  Vector local[kSize * kSize] = {};
  for (int64_t v = 0; v < side.count; ++v) {
    const WinogradChannels& channels = side.vectors[v];
    if (whole && channels.count == W) {
      transform(start + channels.first, down, right, out + v * W, plane);
      continue;
    }
    for (int64_t r = rows.begin; r < rows.end; ++r)
      for (int64_t c = columns.begin; c < columns.end; ++c)
        local[r * kSize + c] = load_up_to(start + r * down + c * right + channels.first, channels.count);
    transform(reinterpret_cast<const float*>(local), int64_t(kSize * W), int64_t(W), out + v * W, plane);
  }
}

template <class Job>
NASDET_INLINE void transform_inputs(const Job& job, const WinogradSide& side, const WinogradTile& tile, float* out,
                                    int64_t plane) {
  transform_tile<6>(job, side, tile.image, tile.row - job.dilation_h, tile.column - job.dilation_w, out, plane,
                    [](const float* p, int64_t down, int64_t right, float* to, int64_t step) {
                      transform_input(p, down, right, to, step);
                    });
}

// A tile's outputs, for the vectors of one panel.
NASDET_INLINE void write_tile(const WinogradProduct& p, const WinogradPanel& panel, const WinogradTile& tile,
                              const float* from) {
  const int64_t pixel = p.wide.pixel, down = p.dilation_h * p.width * pixel, right = p.dilation_w * pixel;
  const int64_t rows = inside(tile.row, p.dilation_h, p.height, 4).end;
  const int64_t columns = inside(tile.column, p.dilation_w, p.width, 4).end;
  float* const start = p.out + ((int64_t(tile.image) * p.height + tile.row) * p.width + tile.column) * pixel;
  for (int64_t v = 0; v < panel.count; ++v) {
    const WinogradChannels& channels = p.wide.vectors[panel.first + v];
    Vector out[4][4];
    transform_output(from + v * W, p.wide_plane, out);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        float* const to = start + r * down + c * right + channels.first;
        store_up_to(to, p.accumulate ? out[r][c] + load_up_to(to, channels.count) : out[r][c], channels.count);
      }
  }
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
