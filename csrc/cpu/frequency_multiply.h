// The matrix products of the frequency domain: register tiles of 6 rows x 4 vectors (6 x 2 on 16 registers), one plane
// after the other, while the next plane's operands are fetched.
#pragma once
#include "frequency_taps.h"

namespace nasdet::NASDET_ISA {
namespace {

// By the load itself: splat(*p) adds it to a zero first, on the units that the products need.
NASDET_INLINE Lane broadcast(const float* p) {
#if defined(__AVX512F__)
  return (Lane)_mm512_set1_ps(*p);
#else
  return (Lane)_mm256_broadcast_ss(p);
#endif
}

constexpr int most_rows(int vectors) { return kFloats == 16 && vectors > 2 ? 24 / vectors : vectors == 2 && kFloats == 8 ? 6 : 12; }

template <int kRows, int kVectors>
NASDET_APART void register_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row, int64_t depth, bool add, const char* ahead, int lines) {
  Lane sums[kRows][kVectors];
  unroll<kRows>([&](auto r) { unroll<kVectors>([&](auto v) { sums[r][v] = Lane{}; }); });
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Lane row[kVectors];
    unroll<kVectors>([&](auto v) { row[v] = load(b + v * kFloats); });
    unroll<kRows>([&](auto r) {
      const Lane factor = broadcast(a + r * a_row);
      unroll<kVectors>([&](auto v) { sums[r][v] += factor * row[v]; });
    });
    for (int i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    a += a_step, b += b_step;
  }
  unroll<kRows>([&](auto r) {
    unroll<kVectors>([&](auto v) {
      float* const p = c + r * c_row + v * kFloats;
      store(p, add ? sums[r][v] + load(p) : sums[r][v]);
    });
  });
}

template <int kVectors, int kRows = most_rows(kVectors)>
NASDET_INLINE void dispatch_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row, int64_t depth, bool add, const char* ahead, int lines) {
  if (rows == kRows) return register_tile<kRows, kVectors>(a, a_row, a_step, b, b_step, c, c_row, depth, add, ahead, lines);
  if constexpr (kRows > 1) dispatch_rows<kVectors, kRows - 1>(rows, a, a_row, a_step, b, b_step, c, c_row, depth, add, ahead, lines);
}

// What the next plane reads, handed out in runs of consecutive lines, and so many of them for each term of a sum that all
// are asked for in time.
struct Ahead {
  const char* next;
  int64_t left;  // lines
  const char* then;
  int lines;
  const char* take(int64_t terms) {
    const char* const from = next;
    next += terms * lines * 64, left -= terms * lines;
    if (left <= 0 && then) next = then, left = INT64_MAX, then = nullptr;
    return from;
  }
};

template <int kVectors>
void panel(const FrequencyProduct& p, const float* a, const float* b, int64_t b_step, float* c, Ahead& ahead) {
  constexpr int kMost = most_rows(kVectors);
  const int64_t blocks = (p.rows + kMost - 1) / kMost;
  for (int64_t i = 0, row = 0; i < blocks; ++i) {
    const int64_t rows = (p.rows - row + blocks - i - 1) / (blocks - i);
    dispatch_rows<kVectors>(rows, a + row * p.a_row, p.a_row, p.a_step, b, b_step, c + row * p.c_row, p.c_row, p.depth, p.add, ahead.take(p.depth), ahead.lines);
    row += rows;
  }
}

inline void multiply(const FrequencyProduct& p, int64_t begin, int64_t end) {
  const auto fetch_rows = [](const float* first, int64_t row, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns; i += 16) __builtin_prefetch(first + r * row + i, 0, 2);
  };
  const bool rows_of_a = p.a_step == 1;  // else its columns are the rows of the product
  const bool all_of_a = rows_of_a && p.depth == p.a_row;
  const int64_t tiles = (p.rows + 5) / 6 * ((p.columns + kPanel - 1) / kPanel), b_lines = p.b_step ? 0 : p.depth * p.columns / 16;
  const int64_t lines = b_lines + (all_of_a ? p.rows * p.depth / 16 : p.add || p.b_step ? p.rows * p.columns / 16 : 0);
  const int64_t each = (lines + tiles * p.depth - 1) / (tiles * p.depth);
  for (int64_t plane = begin; plane < end; ++plane) {
    const float *const a = p.a + plane * p.a_plane, *const b = p.b + plane * p.b_plane;
    float* const c = p.c + plane * p.c_plane;
    const char* const after = all_of_a ? reinterpret_cast<const char*>(a + p.a_plane) : reinterpret_cast<const char*>(c + p.c_plane);
    Ahead ahead{b_lines ? reinterpret_cast<const char*>(b + p.b_plane) : after, b_lines ? b_lines : INT64_MAX, after, each < 4 ? int(each) : 4};
    if (!all_of_a) fetch_rows(a + p.a_plane, rows_of_a ? p.a_row : p.a_step, rows_of_a ? p.rows : p.depth, rows_of_a ? p.depth : p.rows);
    if (p.b_step) fetch_rows(b + p.b_plane, p.b_step, p.depth, p.columns);
    for (int64_t column = 0; column < p.columns; column += kPanel) {
      const int64_t width = p.columns - column < kPanel ? p.columns - column : kPanel;
      const float* const from = b + (p.b_step ? column : column * p.depth);
      const int64_t step = p.b_step ? p.b_step : width;
      switch (width / kFloats) {
        case 1: panel<1>(p, a, from, step, c + column, ahead); break;
        case 2: panel<2>(p, a, from, step, c + column, ahead); break;
#if defined(__AVX512F__)
        case 3: panel<3>(p, a, from, step, c + column, ahead); break;
        case 4: panel<4>(p, a, from, step, c + column, ahead); break;
#endif
      }
    }
  }
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
