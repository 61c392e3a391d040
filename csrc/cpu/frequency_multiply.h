// The matrix products of the frequency domain: register tiles of 6 rows x 4 vectors (6 x 2 on 16 registers), one frequency
// after the other, while the next one's operands are fetched. A complex product a f is Gauss's of three real ones:
//   re = a_re f_re - a_im f_im,  im = (a_re + a_im) (f_re + f_im) - 2 a_re f_re + re
#pragma once
#include "frequency_taps.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int most_rows(int vectors) {
  return kFloats == 16 && vectors > 2 ? 24 / vectors : vectors == 2 && kFloats == 8 ? 6 : 12;
}

// Rows of a factor of a product: row r is at p + r * row, its terms `step` apart.
struct Rows {
  const float* p;
  int64_t row, step;
};

// Of one panel: a complex product, or a real one of `re` alone. Terms of the other factor are b_step apart, its imaginary part
// lies b_im elements behind the real one.
struct PanelProduct {
  bool complex;
  Rows re, im, both;  // the last re + im
  const float* b;
  int64_t b_step, b_im;
  float* c;
  int64_t c_im, c_row, depth;
  bool add;
};

enum class Term { kAdd, kSubtract, kAddOfSum };  // the last with b_re + b_im

template <int kRows, int kVectors> struct RegisterTile {
  Lane sums[kRows][kVectors];

  template <Term kTerm>
  NASDET_INLINE void multiply(const Rows& rows, int64_t first, const float* b, int64_t b_step, int64_t b_im,
                              int64_t depth, const char*& ahead) {
    const int64_t a_row = rows.row, a_step = rows.step;
    const float* a = rows.p + first * a_row;
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      Lane row[kVectors];
      unroll<kVectors>([&](auto v) {
        row[v] =
            kTerm == Term::kAddOfSum ? load(b + v * kFloats) + load(b + b_im + v * kFloats) : load(b + v * kFloats);
      });
      unroll<kRows>([&](auto r) {
        const Lane factor = broadcast(a + r * a_row);
        unroll<kVectors>(
            [&](auto v) { sums[r][v] += kTerm == Term::kSubtract ? -(factor * row[v]) : factor * row[v]; });
      });
      __builtin_prefetch(ahead, 0, 2), ahead += 64;
      a += a_step, b += b_step;
    }
  }

  NASDET_INLINE void put(float* c, int64_t row, bool add) const {
    unroll<kRows>([&](auto r) {
      unroll<kVectors>([&](auto v) {
        float* const to = c + r * row + v * kFloats;
        store(to, add ? sums[r][v] + load(to) : sums[r][v]);
      });
    });
  }
};

template <int kRows, int kVectors>
NASDET_APART void register_tile(const PanelProduct& p, int64_t first, const char* ahead) {
  RegisterTile<kRows, kVectors> tile{};
  float* const c = p.c + first * p.c_row;
  tile.template multiply<Term::kAdd>(p.re, first, p.b, p.b_step, 0, p.depth, ahead);
  if (p.complex) {
    const RegisterTile<kRows, kVectors> re_re = tile;
    tile.template multiply<Term::kSubtract>(p.im, first, p.b + p.b_im, p.b_step, 0, p.depth, ahead);
    tile.put(c, p.c_row, p.add);
    unroll<kRows>([&](auto r) { unroll<kVectors>([&](auto v) { tile.sums[r][v] -= 2 * re_re.sums[r][v]; }); });
    tile.template multiply<Term::kAddOfSum>(p.both, first, p.b, p.b_step, p.b_im, p.depth, ahead);
  }
  tile.put(c + p.c_im, p.c_row, p.add);
}

template <int kVectors, int kRows = most_rows(kVectors)>
NASDET_INLINE void dispatch_rows(int64_t rows, const PanelProduct& p, int64_t first, const char* ahead) {
  if (rows == kRows) return register_tile<kRows, kVectors>(p, first, ahead);
  if constexpr (kRows > 1) dispatch_rows<kVectors, kRows - 1>(rows, p, first, ahead);
}

// What the next frequency reads or writes, in runs of consecutive lines: one is asked for in every step of a sum, for a number of
// them takes a loop that costs more than the few lines that come too late. The last run is for when they are through.
struct Ahead {
  struct Run {
    const float* first;
    int64_t lines;
  };
  Run runs[4];
  int current = 0;
  const char* take(int64_t steps) {
    while (current < 3 && runs[current].lines <= 0) ++current;
    Run& run = runs[current];
    const char* const from = reinterpret_cast<const char*>(run.first);
    run.first += steps * 16, run.lines -= steps;
    return from;
  }
};

template <int kVectors> void panel(const PanelProduct& p, int64_t rows, Ahead& ahead) {
  constexpr int kMost = most_rows(kVectors);
  const int64_t blocks = (rows + kMost - 1) / kMost, steps = p.depth * (p.complex ? 3 : 1);
  for (int64_t i = 0, row = 0; i < blocks; ++i) {
    const int64_t some = (rows - row + blocks - i - 1) / (blocks - i);
    dispatch_rows<kVectors>(some, p, row, ahead.take(steps));
    row += some;
  }
}

inline void dispatch_panel(int64_t width, const PanelProduct& p, int64_t rows, Ahead& ahead) {
  switch (width / kFloats) {
    case 1:
      return panel<1>(p, rows, ahead);
    case 2:
      return panel<2>(p, rows, ahead);
#if defined(__AVX512F__)
    case 3:
      return panel<3>(p, rows, ahead);
    case 4:
      return panel<4>(p, rows, ahead);
#endif
  }
}

NASDET_INLINE int64_t whole_vectors(int64_t count) { return (count + kFloats - 1) / kFloats * kFloats; }

// to[row][column] = a + b.
NASDET_INLINE void pack_sum(const float* a, const float* b, int64_t from_row, int64_t rows, int64_t columns,
                            float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += kFloats)
      store(to + r * columns + i, load(a + r * from_row + i) + load(b + r * from_row + i));
}

inline void multiply(const FrequencyProduct& p) {
  const int64_t packed_row = whole_vectors(p.depth), all = p.complex + p.real;
  for (int64_t f = 0; f < all; ++f) {
    const bool complex = f < p.complex;
    const int64_t plane = complex ? 2 * f : f + p.complex, planes = complex ? 2 : 1;
    const float *const a = p.a + plane * p.a_plane, *const b = p.b + plane * p.b_plane;
    float* const c = p.c + plane * p.c_plane;
    Ahead ahead{{{a + planes * p.a_plane, planes * p.a_plane / 16},
                 {c + planes * p.c_plane, p.fetch_c ? planes * p.c_plane / 16 : 0},
                 {},
                 {a, 0}}};
    if (complex) pack_sum(a, a + p.a_plane, p.a_row, p.rows, packed_row, p.packed);
    for (int64_t column = 0; column < p.columns; column += kPanel) {
      const int64_t width = p.columns - column < kPanel ? p.columns - column : kPanel;
      dispatch_panel(width,
                     {complex,
                      {a, p.a_row, 1},
                      {a + p.a_plane, p.a_row, 1},
                      {p.packed, packed_row, 1},
                      b + column * p.depth,
                      width,
                      p.b_plane,
                      c + column,
                      complex ? p.c_plane : 0,
                      p.c_row,
                      p.depth,
                      p.add},
                     p.rows, ahead);
    }
  }
}

// The columns of a gradient's planes side by side: as the conjugated factor of a complex product, or a real one.
NASDET_INLINE void pack_factors(const FrequencyGradientProduct& p, const float* planes, bool complex, float* to) {
  const int64_t part = p.tiles * p.columns;
  for (int64_t column = 0; column < p.columns; column += kFloats) {
    const float* from = planes + column / p.b_row * p.b_block + column % p.b_row;
    for (int64_t tile = 0; tile < p.tiles; ++tile, from += p.b_row) {
      float* const at = to + tile * p.columns + column;
      store(at, load(from));
      if (complex) store(at + part, -load(from + p.b_plane));
    }
  }
}

inline void multiply_gradients(const FrequencyGradientProduct& p) {
  const int64_t sum_row = whole_vectors(p.rows), part = p.tiles * p.columns, all = p.complex + p.real;
  float *const sums = p.packed, *const factors = p.packed + p.tiles * sum_row;
  for (int64_t f = 0; f < all; ++f) {
    const bool complex = f < p.complex;
    const int64_t plane = complex ? 2 * f : f + p.complex, planes = complex ? 2 : 1, b_lines = planes * p.b_plane / 16;
    const float *const a = p.a + plane * p.a_plane, *const b = p.b + plane * p.b_plane;
    float* const c = p.c + plane * p.c_plane;
    Ahead ahead{{{a + planes * p.a_plane, planes * p.a_plane / 16},
                 {b + planes * p.b_plane, b_lines},
                 {b + p.b_block + planes * p.b_plane, p.columns > p.b_row ? b_lines : 0},
                 {a, 0}}};
    pack_factors(p, b, complex, factors);
    if (complex) pack_sum(a, a + p.a_plane, p.a_row, p.tiles, sum_row, sums);
    for (int64_t column = 0; column < p.columns; column += kPanel) {
      const int64_t width = p.columns - column < kPanel ? p.columns - column : kPanel;
      dispatch_panel(width,
                     {complex,
                      {a, 1, p.a_row},
                      {a + p.a_plane, 1, p.a_row},
                      {sums, 1, sum_row},
                      factors + column,
                      p.columns,
                      part,
                      c + column,
                      complex ? p.c_plane : 0,
                      p.columns,
                      p.tiles,
                      false},
                     p.rows, ahead);
    }
  }
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
