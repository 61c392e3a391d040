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

  // The sums over rows' columns: [y or x even or odd][frequency of columns][y].
  struct alignas(64) Half { Lane even_even[kLast + 1][R + 1], even_odd[kLast + 1][R + 1], odd_even[kLast + 1][R + 1], odd_odd[kLast + 1][R + 1]; };

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
  static NASDET_APART void fold_rows(const float* grid, int y, Half& half) {
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
      cosines<decltype(k){}>(even_even, half.even_even[k][y], half.even_even[kLast - k][y]);
      cosines<decltype(k){}>(odd_even, half.odd_even[k][y], half.odd_even[kLast - k][y]);
      if constexpr (decltype(k){} > 0) {
        sines<decltype(k){}>(even_odd, half.even_odd[k][y], half.even_odd[kLast - k][y]);
        sines<decltype(k){}>(odd_odd, half.odd_odd[k][y], half.odd_odd[kLast - k][y]);
      }
    });
  }

  // The weights' form of the frequency re - i minus_im, or of its conjugate: re, im - re, re + im.
  template <bool kConjugate> static NASDET_INLINE void put(float* p, int64_t plane, Lane re, Lane minus_im, bool streaming) {
    store_plane(p, re, streaming);
    store_plane(p + plane, kConjugate ? minus_im - re : -(minus_im + re), streaming);
    store_plane(p + 2 * plane, kConjugate ? re + minus_im : re - minus_im, streaming);
  }

  template <bool kConjugate> static NASDET_APART void complex_column(const Half& half, int column, float* planes, int64_t plane, bool streaming) {
    float* const p = planes + 3 * Tile<T>::bin(column) * plane;
    const auto bins = [&](auto k, Lane a, Lane b, Lane d, Lane e) {  // frequencies k and T - k
      constexpr int at = decltype(k){};
      if constexpr (at % kLast == 0) {
        put<kConjugate>(p + 3 * at * plane, plane, a, b, streaming);
      } else {
        put<kConjugate>(p + 3 * at * plane, plane, a - e, b + d, streaming);
        put<kConjugate>(p + 3 * (T - at) * plane, plane, a + e, b - d, streaming);
      }
    };
    unroll<kQuarter + 1>([&](auto k) {
      Lane a[2], b[2], d[2], e[2];
      cosines<decltype(k){}>(half.even_even[column], a[0], a[1]), cosines<decltype(k){}>(half.even_odd[column], b[0], b[1]);
      sines<decltype(k){}>(half.odd_even[column], d[0], d[1]), sines<decltype(k){}>(half.odd_odd[column], e[0], e[1]);
      bins(k, a[0], b[0], d[0], e[0]);
      if constexpr (decltype(k){} < kQuarter) bins(Constant<kLast - decltype(k){}>{}, a[1], b[1], d[1], e[1]);
    });
  }
  template <bool kConjugate> static NASDET_APART void real_column(const Half& half, int column, float* planes, int64_t plane, bool streaming) {
    float* const p = planes + 3 * (Tile<T>::bin(column) - 1) * plane;
    float* const real = planes + (3 * Tile<T>::kBins + (column ? 2 : 0)) * plane;
    const auto bin = [&](auto k, Lane a, Lane d) {
      constexpr int at = decltype(k){};
      if constexpr (at % kLast == 0) store_plane(real + at / kLast * plane, a, streaming);
      else put<kConjugate>(p + 3 * at * plane, plane, a, d, streaming);
    };
    unroll<kQuarter + 1>([&](auto k) {
      Lane a[2], d[2];
      cosines<decltype(k){}>(half.even_even[column], a[0], a[1]), sines<decltype(k){}>(half.odd_even[column], d[0], d[1]);
      bin(k, a[0], d[0]);
      if constexpr (decltype(k){} < kQuarter) bin(Constant<kLast - decltype(k){}>{}, a[1], d[1]);
    });
  }
  template <bool kConjugate> static void columns(const Half& half, float* planes, int64_t plane, bool streaming) {
    real_column<kConjugate>(half, 0, planes, plane, streaming);
    real_column<kConjugate>(half, kLast, planes, plane, streaming);
    for (int column = 1; column < kLast; ++column) complex_column<kConjugate>(half, column, planes, plane, streaming);
  }

  // Of products with a conjugated factor; T * T / 2 times the taps.
  static NASDET_APART void complex_column_back(const float* planes, int64_t plane, int ahead, Half& half, int column) {
    const float* const p = planes + 3 * Tile<T>::bin(column) * plane;
    const auto take = [&](int k, Lane& re, Lane& im) { Tile<T>::template take<true>(p + 3 * k * plane, plane, ahead, re, im); };
    Lane a[kLast + 1], b[kLast + 1], d[kLast + 1], e[kLast + 1];
    unroll<kLast + 1>([&](auto k) {
      take(k, a[k], b[k]);
      b[k] = -b[k];
      if constexpr (decltype(k){} % kLast != 0) {
        Lane re, im;
        take(T - k, re, im);
        e[k] = re - a[k], d[k] = im + b[k], a[k] += re, b[k] -= im;
      }
    });
    cosines_back(a, half.even_even[column]), cosines_back(b, half.even_odd[column]);
    sines_back(d, half.odd_even[column]), sines_back(e, half.odd_odd[column]);
  }
  static NASDET_APART void real_column_back(const float* planes, int64_t plane, int ahead, Half& half, int column) {
    const float* const p = planes + 3 * (Tile<T>::bin(column) - 1) * plane;
    const float* const real = planes + (3 * Tile<T>::kBins + (column ? 2 : 0)) * plane;
    Lane a[kLast + 1], d[kLast + 1];
    a[0] = .5f * load(real), a[kLast] = .5f * load(real + plane);
    unroll<kLast - 1>([&](auto i) {
      constexpr int k = i + 1;
      Tile<T>::template take<true>(p + 3 * k * plane, plane, ahead, a[k], d[k]);
      d[k] = -d[k];
    });
    cosines_back(a, half.even_even[column]), sines_back(d, half.odd_even[column]);
    unroll<R + 1>([&](auto y) { half.even_odd[column][y] = half.odd_odd[column][y] = Lane{}; });
  }
  static void columns_back(const float* planes, int64_t plane, int ahead, Half& half) {
    real_column_back(planes, plane, ahead, half, 0);
    real_column_back(planes, plane, ahead, half, kLast);
    for (int column = 1; column < kLast; ++column) complex_column_back(planes, plane, ahead, half, column);
  }

  // Back to row y and row -y of a grid.
  static NASDET_APART void unfold_rows(const Half& half, int y, float* grid) {
    const auto row_of = [&](const Lane (&from)[kLast + 1][R + 1], Lane (&to)[kLast + 1]) { unroll<kLast + 1>([&](auto k) { to[k] = from[k][y]; }); };
    Lane at[kLast + 1], even_even[R + 1], even_odd[R + 1], odd_even[R + 1], odd_odd[R + 1];
    row_of(half.even_even, at), cosines_back(at, even_even);
    row_of(half.even_odd, at), sines_back(at, even_odd);
    row_of(half.odd_even, at), cosines_back(at, odd_even);
    row_of(half.odd_odd, at), sines_back(at, odd_odd);
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
