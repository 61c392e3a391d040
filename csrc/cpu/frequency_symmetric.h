// Spectra of small grids of taps around the centre of a T x T tile, and back. A grid is split into what is even and what
// is odd in each direction, of which only the quarter y, x >= 0 is left; the four quarters have cosine and sine sums of
// R + 1 real terms in the place of complex transforms of T. What frequency T/2 - k has is that of k up to the signs of
// the odd terms.
#pragma once
#include "frequency_tile.h"

namespace nasdet::NASDET_ISA {
namespace {

template <int T, int R> struct TapTransform {
  static_assert(T % 4 == 0 && 2 * R < T, "quarters of a circle, and taps of which none wraps round onto another");
  static constexpr int kGrid = 2 * R + 1, kLast = T / 2, kQuarter = T / 4;

  // A column of the half spectrum: what is even or odd in y, and in x, by row y. A half has kLast + 1 of them.
  struct Column { Lane even_even[R + 1], even_odd[R + 1], odd_even[R + 1], odd_odd[R + 1]; };
  static_assert(sizeof(Column) * (kLast + 1) == size_t(frequency_half(T, kGrid)) * kBytes, "a half as the launcher counts it");

  // sum += term cos(tau K / T), or with the sine.
  template <bool kSine, int K> static NASDET_INLINE void add(Lane& sum, Lane term) {
    constexpr float factor = float(kSine ? sine(K, T) : cosine(K, T));
    if constexpr (factor == 1) sum += term;
    else if constexpr (factor == -1) sum -= term;
    else if constexpr (factor != 0) sum += factor * term;
  }

  // sum_j x_j cos(tau j K / T), and the same for T/2 - K.
  template <int K> static NASDET_INLINE void cosines(const Lane* x, Lane& at, Lane& mirrored) {
    Lane even = x[0], odd{};
    unroll<R>([&](auto i) {
      constexpr int j = i + 1;
      add<false, j * K>(j % 2 ? odd : even, x[j]);
    });
    at = even + odd, mirrored = even - odd;
  }
  // sum_j x_j sin(tau j K / T), and the same for T/2 - K; x[0] is not read.
  template <int K> static NASDET_INLINE void sines(const Lane* x, Lane& at, Lane& mirrored) {
    Lane even{}, odd{};
    unroll<R>([&](auto i) {
      constexpr int j = i + 1;
      add<true, j * K>(j % 2 ? odd : even, x[j]);
    });
    at = odd + even, mirrored = odd - even;
  }
  // The transposes: y_j = sum_k x_k cos(tau j k / T) over k = 0..T/2, and y_j = sum_k x_k sin(tau j k / T) over 0 < k < T/2.
  static NASDET_INLINE void cosines_back(const Lane (&x)[kLast + 1], Lane (&y)[R + 1]) {
    Lane sum[kQuarter + 1], difference[kQuarter];
    unroll<kQuarter>([&](auto k) { sum[k] = x[k] + x[kLast - k], difference[k] = x[k] - x[kLast - k]; });
    sum[kQuarter] = x[kQuarter];
    unroll<R + 1>([&](auto index) {
      constexpr int j = index;
      y[j] = Lane{};
      unroll<kQuarter + 1 - j % 2>([&](auto k) { add<false, j * decltype(k){}>(y[j], j % 2 ? difference[k] : sum[k]); });
    });
  }
  static NASDET_INLINE void sines_back(const Lane (&x)[kLast + 1], Lane (&y)[R + 1]) {
    Lane sum[kQuarter], difference[kQuarter - 1];  // of frequencies k + 1
    unroll<kQuarter - 1>([&](auto i) { sum[i] = x[i + 1] + x[kLast - 1 - i], difference[i] = x[i + 1] - x[kLast - 1 - i]; });
    sum[kQuarter - 1] = x[kQuarter];
    y[0] = Lane{};
    unroll<R>([&](auto r) {
      constexpr int j = r + 1;
      y[j] = Lane{};
      unroll<kQuarter - 1 + j % 2>([&](auto i) { add<true, j * (decltype(i){} + 1)>(y[j], j % 2 ? sum[i] : difference[i]); });
    });
  }

  // Row y and row -y of a grid [kGrid][kGrid][lane].
  static NASDET_APART void fold_rows(const float* grid, int y, Column* half) {
    const float *const below = grid + ((R + y) * kGrid + R) * kFloats, *const above = grid + ((R - y) * kGrid + R) * kFloats;
    Lane even_even[R + 1], even_odd[R + 1], odd_even[R + 1], odd_odd[R + 1];
    const Lane both = splat<float>(y == 0 ? 0 : 1);  // row 0 counts once
    even_even[0] = load(below) + both * load(above), odd_even[0] = load(below) - load(above);
    unroll<R>([&](auto i) {
      constexpr int x = i + 1;
      const Lane right = load(below + x * kFloats), left = load(below - x * kFloats), right_above = both * load(above + x * kFloats), left_above = both * load(above - x * kFloats);
      const Lane even_right = right + right_above, even_left = left + left_above, odd_right = right - right_above, odd_left = left - left_above;
      even_even[x] = even_right + even_left, even_odd[x] = even_right - even_left, odd_even[x] = odd_right + odd_left, odd_odd[x] = odd_right - odd_left;
    });
    unroll<kQuarter + 1>([&](auto k) {
      Column &at = half[k], &mirrored = half[kLast - k];
      cosines<decltype(k){}>(even_even, at.even_even[y], mirrored.even_even[y]), cosines<decltype(k){}>(odd_even, at.odd_even[y], mirrored.odd_even[y]);
      sines<decltype(k){}>(even_odd, at.even_odd[y], mirrored.even_odd[y]), sines<decltype(k){}>(odd_odd, at.odd_odd[y], mirrored.odd_odd[y]);
    });
  }

  // The frequency re - i minus_im as the second factor of a map's gradient, or its conjugate as that of a map.
  template <bool kGradient> static NASDET_INLINE void put(float* p, int64_t plane, Lane re, Lane minus_im) {
    store(p, kGradient ? re + minus_im : re), store(p + plane, kGradient ? re : minus_im - re), store(p + 2 * plane, kGradient ? minus_im : re + minus_im);
  }

  // The planes of a step: one complex column, or the two real ones.
  template <bool kGradient> static NASDET_APART void complex_column(const Column& column, float* p, int64_t plane) {
    const auto bins = [&](auto k, Lane a, Lane b, Lane d, Lane e) {  // frequencies k and T - k
      constexpr int at = decltype(k){};
      if constexpr (at % kLast == 0) {
        put<kGradient>(p + 3 * at * plane, plane, a, b);
      } else {
        put<kGradient>(p + 3 * at * plane, plane, a - e, b + d);
        put<kGradient>(p + 3 * (T - at) * plane, plane, a + e, b - d);
      }
    };
    unroll<kQuarter + 1>([&](auto k) {
      Lane a[2], b[2], d[2], e[2];
      cosines<decltype(k){}>(column.even_even, a[0], a[1]), cosines<decltype(k){}>(column.even_odd, b[0], b[1]);
      sines<decltype(k){}>(column.odd_even, d[0], d[1]), sines<decltype(k){}>(column.odd_odd, e[0], e[1]);
      bins(k, a[0], b[0], d[0], e[0]);
      if constexpr (decltype(k){} < kQuarter) bins(Constant<kLast - decltype(k){}>{}, a[1], b[1], d[1], e[1]);
    });
  }
  template <bool kGradient> static NASDET_APART void real_columns(const Column* half, float* planes, int64_t plane) {
    for (int last = 0; last < 2; ++last) {
      const Column& column = half[last * kLast];
      float *const p = planes + 3 * (last * (kLast - 1) - 1) * plane, *const real = planes + (6 * (kLast - 1) + 2 * last) * plane;
      const auto bin = [&](auto k, Lane a, Lane d) {
        constexpr int at = decltype(k){};
        if constexpr (at % kLast == 0) store(real + at / kLast * plane, a);
        else put<kGradient>(p + 3 * at * plane, plane, a, d);
      };
      unroll<kQuarter + 1>([&](auto k) {
        Lane a[2], d[2];
        cosines<decltype(k){}>(column.even_even, a[0], a[1]), sines<decltype(k){}>(column.odd_even, d[0], d[1]);
        bin(k, a[0], d[0]);
        if constexpr (decltype(k){} < kQuarter) bin(Constant<kLast - decltype(k){}>{}, a[1], d[1]);
      });
    }
  }

  static NASDET_INLINE void keep(Lane (&to)[R + 1], const Lane (&from)[R + 1], bool add) {
    unroll<R + 1>([&](auto y) { to[y] = add ? to[y] + from[y] : from[y]; });
  }
  static NASDET_INLINE void take(const float* p, int64_t plane, Lane& re, Lane& im) { Tile<T>::template take<FrequencyResult::kWeightGradient>(p, plane, re, im); }

  // Of products with a conjugated factor; T * T / 2 times the taps.
  static NASDET_APART void complex_column_back(const float* p, int64_t plane, Column& column, bool add) {
    Lane a[kLast + 1], b[kLast + 1], d[kLast + 1], e[kLast + 1], y[R + 1];
    unroll<kLast + 1>([&](auto k) {
      take(p + 3 * k * plane, plane, a[k], b[k]);
      b[k] = -b[k];
      if constexpr (decltype(k){} % kLast != 0) {
        Lane re, im;
        take(p + 3 * (T - k) * plane, plane, re, im);
        e[k] = re - a[k], d[k] = im + b[k], a[k] += re, b[k] -= im;
      }
    });
    cosines_back(a, y), keep(column.even_even, y, add);
    cosines_back(b, y), keep(column.even_odd, y, add);
    sines_back(d, y), keep(column.odd_even, y, add);
    sines_back(e, y), keep(column.odd_odd, y, add);
  }
  static NASDET_APART void real_columns_back(const float* planes, int64_t plane, Column* half, bool add) {
    for (int last = 0; last < 2; ++last) {
      const float *const p = planes + 3 * (last * (kLast - 1) - 1) * plane, *const real = planes + (6 * (kLast - 1) + 2 * last) * plane;
      Lane a[kLast + 1], d[kLast + 1], y[R + 1];
      a[0] = .5f * load(real), a[kLast] = .5f * load(real + plane);
      unroll<kLast - 1>([&](auto i) {
        constexpr int k = i + 1;
        take(p + 3 * k * plane, plane, a[k], d[k]);
        d[k] = -d[k];
      });
      cosines_back(a, y), keep(half[last * kLast].even_even, y, add);
      sines_back(d, y), keep(half[last * kLast].odd_even, y, add);
    }
  }

  // Back to row y and row -y of a grid.
  static NASDET_APART void unfold_rows(const Column* half, int y, float* grid) {
    const auto row_of = [&](const Lane (Column::*part)[R + 1], Lane (&to)[kLast + 1]) { unroll<kLast + 1>([&](auto k) { to[k] = (half[k].*part)[y]; }); };
    Lane at[kLast + 1], even_even[R + 1], even_odd[R + 1], odd_even[R + 1], odd_odd[R + 1];
    row_of(&Column::even_even, at), cosines_back(at, even_even);
    row_of(&Column::even_odd, at), sines_back(at, even_odd);
    row_of(&Column::odd_even, at), cosines_back(at, odd_even);
    row_of(&Column::odd_odd, at), sines_back(at, odd_odd);
    float *const below = grid + ((R + y) * kGrid + R) * kFloats, *const above = grid + ((R - y) * kGrid + R) * kFloats;
    unroll<R + 1>([&](auto i) {
      constexpr int x = i;
      store(above + x * kFloats, even_even[x] + even_odd[x] - odd_even[x] - odd_odd[x]);
      if constexpr (x > 0) store(above - x * kFloats, even_even[x] - even_odd[x] - odd_even[x] + odd_odd[x]);
      store(below + x * kFloats, even_even[x] + even_odd[x] + odd_even[x] + odd_odd[x]);
      if constexpr (x > 0) store(below - x * kFloats, even_even[x] - even_odd[x] + odd_even[x] - odd_odd[x]);
    });
  }
};

}  // namespace
}  // namespace nasdet::NASDET_ISA
