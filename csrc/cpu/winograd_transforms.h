// Winograd's transforms for the points 0, infinity, +-1/sqrt(2) and +-sqrt(2), in this order, a vector of channels at a time.
// These points keep the error at half of that of 0, +-1, +-2, for the same number of operations.
#pragma once
#include "nasdet/simd.h"
#include "winograd_plan.h"

namespace nasdet::NASDET_ISA {
namespace {

using Vector = vec<float>;
inline constexpr float kA = 0.70710678118654752440f, kB = 1.41421356237309504880f;  // a^2 = 1/2, b^2 = 2, a^2 b^2 = 1

// The six values at the points of the 4 coefficients d: x's powers, 1, x, x^2, x^3; infinity gives the last one.
NASDET_INLINE void evaluate4(const Vector* d, Vector* out) {
  const Vector even_a = d[0] + 0.5f * d[2], odd_a = kA * d[1] + 0.5f * kA * d[3];
  const Vector even_b = d[0] + 2 * d[2], odd_b = kB * d[1] + 2 * kB * d[3];
  out[0] = d[0], out[1] = d[3];
  out[2] = even_a + odd_a, out[3] = even_a - odd_a;
  out[4] = even_b + odd_b, out[5] = even_b - odd_b;
}

// The transpose of the above: 4 sums of 6 values.
NASDET_INLINE void sum4(const Vector* m, Vector* out) {
  const Vector even_a = m[2] + m[3], odd_a = m[2] - m[3], even_b = m[4] + m[5], odd_b = m[4] - m[5];
  out[0] = m[0] + even_a + even_b;
  out[1] = kA * odd_a + kB * odd_b;
  out[2] = 0.5f * even_a + 2 * even_b;
  out[3] = (0.5f * kA) * odd_a + (2 * kB * odd_b + m[1]);
}

// The 6 values of the kernel's 3 taps, over the products of the differences between the points.
NASDET_INLINE void evaluate3(const Vector* g, Vector* out) {
  constexpr float kNa = -1 / 1.5f, kNb = 1 / 6.f;
  const Vector even_a = kNa * g[0] + (0.5f * kNa) * g[2], odd_a = (kA * kNa) * g[1];
  const Vector even_b = kNb * g[0] + (2 * kNb) * g[2], odd_b = (kB * kNb) * g[1];
  out[0] = g[0], out[1] = g[2];
  out[2] = even_a + odd_a, out[3] = even_a - odd_a;
  out[4] = even_b + odd_b, out[5] = even_b - odd_b;
}

// The transpose of the above: 3 sums of 6 values.
NASDET_INLINE void sum3(const Vector* m, Vector* out) {
  constexpr float kNa = -1 / 1.5f, kNb = 1 / 6.f;
  const Vector even_a = m[2] + m[3], odd_a = m[2] - m[3], even_b = m[4] + m[5], odd_b = m[4] - m[5];
  out[0] = m[0] + kNa * even_a + kNb * even_b;
  out[1] = (kA * kNa) * odd_a + (kB * kNb) * odd_b;
  out[2] = (0.5f * kNa) * even_a + ((2 * kNb) * even_b + m[1]);
}

// The input transform of one line of 6 values.
NASDET_INLINE void interpolate(const Vector* d, Vector* out) {
  const Vector even_a = d[4] - 2 * d[2], odd_a = kA * d[3] - (2 * kA) * d[1];
  const Vector even_b = d[4] - 0.5f * d[2], odd_b = kB * d[3] - (0.5f * kB) * d[1];
  out[0] = (d[0] + d[4]) - 2.5f * d[2];
  out[1] = (d[1] + d[5]) - 2.5f * d[3];
  out[2] = even_a + odd_a, out[3] = even_a - odd_a;
  out[4] = even_b + odd_b, out[5] = even_b - odd_b;
}

NASDET_INLINE void interpolate(const Vector* d, float* out, int64_t plane) {
  Vector values[6];
  interpolate(d, values);
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) store(out + j * plane, values[j]);
}

// The input transform of 6 x 6 pixels, get(row, column), to the 36 planes, the columns first. A loop over the lines keeps them
// in memory: 16 registers hold too few of them for a compiler to do well with all at once.
template <class Get> NASDET_INLINE void transform_input_in_two(const Get& get, float* out, int64_t plane) {
  Vector lines[6][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    Vector d[6], values[6];
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) d[r] = get(r, j);
    interpolate(d, values);
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) lines[r][j] = values[r];
  }
#pragma GCC unroll 1
  for (int r = 0; r < 6; ++r) interpolate(lines[r], out + r * 6 * plane, plane);
}

// The same. Pixels are read again for each pair of lines: with 32 registers that is cheaper than keeping 36 vectors between the
// passes.
template <class Get> NASDET_INLINE void transform_input(const Get& get, float* out, int64_t plane) {
  if constexpr (kLanes<float> == 8) return transform_input_in_two(get, out, plane);
  Vector first[6], second[6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) first[j] = (get(0, j) + get(4, j)) - 2.5f * get(2, j);
  interpolate(first, out, plane);
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) first[j] = (get(1, j) + get(5, j)) - 2.5f * get(3, j);
  interpolate(first, out + 6 * plane, plane);
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    const Vector even = get(4, j) - 2 * get(2, j), odd = kA * get(3, j) - (2 * kA) * get(1, j);
    first[j] = even + odd, second[j] = even - odd;
  }
  interpolate(first, out + 12 * plane, plane);
  interpolate(second, out + 18 * plane, plane);
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    const Vector even = get(4, j) - 0.5f * get(2, j), odd = kB * get(3, j) - (0.5f * kB) * get(1, j);
    first[j] = even + odd, second[j] = even - odd;
  }
  interpolate(first, out + 24 * plane, plane);
  interpolate(second, out + 30 * plane, plane);
}

// The transpose of the output transform, of 4 x 4 pixels, get(row, column), to the 36 planes: what the gradient of the weights takes
// of y's.
template <class Get> NASDET_INLINE void transform_gradient(const Get& get, float* out, int64_t plane) {
  Vector lines[4][6];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector d[4] = {get(0, j), get(1, j), get(2, j), get(3, j)};
    evaluate4(d, lines[j]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < 6; ++r) {
    const Vector d[4] = {lines[0][r], lines[1][r], lines[2][r], lines[3][r]};
    Vector values[6];
    evaluate4(d, values);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) store(out + (r * 6 + j) * plane, values[j]);
  }
}

// The output transform of 36 planes: put(row, column, value) for the 4 x 4 outputs.
template <class Put> NASDET_INLINE void transform_output(const float* p, int64_t plane, const Put& put) {
  Vector lines[4][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    Vector m[6], sums[4];
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) m[r] = load(p + (r * 6 + j) * plane);
    sum4(m, sums);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) lines[r][j] = sums[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    Vector values[4];
    sum4(lines[r], values);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) put(r, c, values[c]);
  }
}

// The kernel's transform of 3 x 3 taps: put(plane, value) for the 36 planes.
template <class Put> NASDET_INLINE void transform_kernel(const Vector* taps, int64_t step, const Put& put) {
  Vector lines[3][6];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const Vector g[3] = {taps[j * step], taps[(3 + j) * step], taps[(6 + j) * step]};
    evaluate3(g, lines[j]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < 6; ++r) {
    const Vector g[3] = {lines[0][r], lines[1][r], lines[2][r]};
    Vector values[6];
    evaluate3(g, values);
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) put(r * 6 + j, values[j]);
  }
}

// The transpose of the above, of 36 planes to 3 x 3 taps.
NASDET_INLINE void collect_kernel(const float* p, int64_t plane, Vector* taps) {
  Vector lines[3][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    Vector m[6], sums[3];
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) m[r] = load(p + (r * 6 + j) * plane);
    sum3(m, sums);
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) lines[r][j] = sums[r];
  }
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) sum3(lines[r], taps + 3 * r);
}

// Rows to columns of a square of vectors: log2(lanes) perfect shuffles.
NASDET_INLINE void transpose(Vector* rows) {
  constexpr int W = kLanes<float>;
  vec_i32 low, high;
  for (int i = 0; i < W; ++i) low[i] = i / 2 + (i % 2) * W, high[i] = low[i] + W / 2;
  for (int step = 1; step < W; step *= 2) {
    Vector next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
