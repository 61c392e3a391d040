// The matrix product of one plane: C[rows][kVectors vectors] = A B, with all of C in registers.
#pragma once
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {
namespace {

#if defined(__AVX512F__)
inline constexpr int kMostVectors = 4, kAccumulators = 24;
#else
inline constexpr int kMostVectors = 2, kAccumulators = 12;
#endif
constexpr int most_rows(int vectors) { return vectors == 1 ? 12 : kAccumulators / vectors; }

// Sums run over k in order from zero, or from C: an element's bits depend neither on its row nor on its panel. Each k
// also asks for one line at `ahead`.
template <int kRows, int kVectors>
__attribute__((noinline)) void multiply_block(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k,
                                              float* c, int64_t c_row, int64_t depth, bool accumulate,
                                              const float* ahead) {
  constexpr int W = kLanes<float>;
  vec<float> sum[kRows][kVectors];
  if (accumulate) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = load(c + r * c_row + v * W);
  } else {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = vec<float>{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vec<float> line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) line[v] = load(b + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const vec<float> factor = broadcast(a + r * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * line[v];
    }
    __builtin_prefetch(ahead, 0, 2);
    ahead += 16;
    a += a_k, b += b_k;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * W, sum[r][v]);
}

using MultiplyBlock = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool,
                               const float*);

// For so many rows; more than the registers hold are never asked for.
template <int kRows, int kVectors>
constexpr MultiplyBlock kMultiply = multiply_block<(kRows <= most_rows(kVectors) ? kRows : 1), kVectors>;

template <int kVectors> MultiplyBlock kernel_for(int64_t rows) {
  static constexpr MultiplyBlock kKernels[] = {
      kMultiply<1, kVectors>, kMultiply<2, kVectors>,  kMultiply<3, kVectors>,  kMultiply<4, kVectors>,
      kMultiply<5, kVectors>, kMultiply<6, kVectors>,  kMultiply<7, kVectors>,  kMultiply<8, kVectors>,
      kMultiply<9, kVectors>, kMultiply<10, kVectors>, kMultiply<11, kVectors>, kMultiply<12, kVectors>};
  return kKernels[rows - 1];
}

// Any number of rows, in blocks of about equal size. `ahead` is what comes next: of the first block; `ahead_row` further per row.
template <int kVectors>
void multiply_rows(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k, float* c, int64_t c_row,
                   int64_t rows, int64_t depth, bool accumulate, const float* ahead, int64_t ahead_row) {
  const int64_t blocks = (rows + most_rows(kVectors) - 1) / most_rows(kVectors);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
    kernel_for<kVectors>(count)(a + first * a_row, a_row, a_k, b, b_k, c + first * c_row, c_row, depth, accumulate,
                                ahead + first * ahead_row);
  }
}

NASDET_INLINE void multiply(int64_t vectors, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k,
                            float* c, int64_t c_row, int64_t rows, int64_t depth, bool accumulate, const float* ahead,
                            int64_t ahead_row) {
  if (vectors == 1) return multiply_rows<1>(a, a_row, a_k, b, b_k, c, c_row, rows, depth, accumulate, ahead, ahead_row);
#if defined(__AVX512F__)
  if (vectors == 3) return multiply_rows<3>(a, a_row, a_k, b, b_k, c, c_row, rows, depth, accumulate, ahead, ahead_row);
  if (vectors == 4) return multiply_rows<4>(a, a_row, a_k, b, b_k, c, c_row, rows, depth, accumulate, ahead, ahead_row);
#endif
  multiply_rows<2>(a, a_row, a_k, b, b_k, c, c_row, rows, depth, accumulate, ahead, ahead_row);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
