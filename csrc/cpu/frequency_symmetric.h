// Spectra of small grids of taps around the centre of a T x T tile, and back. A grid is split into what is even and what
// is odd in each direction, of which only the quarter y, x >= 0 is left, and of that the places that have taps; the four
// parts have cosine and sine sums of few real terms in the place of complex transforms of T: along x one column of the
// spectrum at a time, then along y. What frequency T/2 - k has is that of k up to the signs of the odd terms.
#pragma once
#include "frequency_tile.h"

namespace nasdet::NASDET_ISA {
namespace {

// cos(tau k / T).
template <int T> struct Circle {
  float cosines[T];
  constexpr Circle() : cosines{} {
    for (int k = 0; k < T; ++k) cosines[k] = float(cosine(k, T));
  }
};
template <int T> constexpr Circle<T> kCircle{};

template <int T, int R> struct TapTransform {
  static_assert(T % 4 == 0 && 2 * R < T, "quarters of a circle, and taps of which none wraps round onto another");
  static constexpr int kGrid = 2 * R + 1, kLast = T / 2, kQuarter = T / 4;
  static constexpr int64_t kPlane = frequency_step_plane(kFloats);

  // A column of the spectrum by rows of taps: for each parity, as in FrequencyPlace.
  static constexpr int kRows = 4 * (R + 1);
  struct Column {
    Lane rows[kRows];
    NASDET_INLINE Lane* part(int parity) { return rows + parity * (R + 1); }
    NASDET_INLINE const Lane* part(int parity) const { return rows + parity * (R + 1); }
  };

  // What a column of the spectrum takes of each term.
  struct Factors {
    float of[kGrid * kGrid];
    Factors(const FrequencyFold& fold, int column) {
      for (int64_t i = 0; i < fold.place_count; ++i)
        for (int parity = 0; parity < 4; ++parity)
          if (const FrequencyPlace& p = fold.places[i]; p.term[parity] >= 0)
            of[p.term[parity]] = kCircle<T>.cosines[(p.x * column + (parity % 2 ? 3 * kQuarter : 0)) % T];
    }
  };

  // Of kCount vectors of terms, `apart` floats from each other.
  template <int kCount>
  static NASDET_INLINE void add_up(const FrequencyFold& fold, const Factors& factors, const float* terms, int64_t apart,
                                   Column* columns) {
    for (int row = 0, i = 0; row < kRows; ++row) {
      Lane sums[kCount] = {};
      for (const int end = fold.ends[row]; i < end; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < kCount; ++n) sums[n] += factors.of[i] * load(terms + n * apart + i * kFloats);
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) columns[n].rows[row] = sums[n];
    }
  }
  template <bool kAdd, int kCount>
  static NASDET_INLINE void deal_out(const FrequencyFold& fold, const Factors& factors, const Column* columns,
                                     float* terms, int64_t apart) {
    for (int row = 0, i = 0; row < kRows; ++row)
      for (const int end = fold.ends[row]; i < end; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < kCount; ++n) {
          float* const term = terms + n * apart + i * kFloats;
          const Lane value = factors.of[i] * columns[n].rows[row];
          store(term, kAdd ? load(term) + value : value);
        }
  }

  // So many vectors share the way through the rows, which are short.
  static constexpr int kTogether = 4;
  static NASDET_INLINE void columns_of(const FrequencyFold& fold, const Factors& factors, const float* terms,
                                       int64_t apart, int count, Column (&columns)[kTogether]) {
    if (count == kTogether) return add_up<kTogether>(fold, factors, terms, apart, columns);
    for (int n = 0; n < count; ++n) add_up<1>(fold, factors, terms + n * apart, apart, columns + n);
  }
  template <bool kAdd>
  static NASDET_INLINE void columns_back(const FrequencyFold& fold, const Factors& factors,
                                         const Column (&columns)[kTogether], int count, float* terms, int64_t apart) {
    if (count == kTogether) return deal_out<kAdd, kTogether>(fold, factors, columns, terms, apart);
    for (int n = 0; n < count; ++n) deal_out<kAdd, 1>(fold, factors, columns + n, terms + n * apart, apart);
  }

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
  static NASDET_INLINE void cosines_back(const Lane (&x)[kLast + 1], Lane* y) {
    Lane sum[kQuarter + 1], difference[kQuarter];
    unroll<kQuarter>([&](auto k) { sum[k] = x[k] + x[kLast - k], difference[k] = x[k] - x[kLast - k]; });
    sum[kQuarter] = x[kQuarter];
    unroll<R + 1>([&](auto index) {
      constexpr int j = index;
      y[j] = Lane{};
      unroll<kQuarter + 1 - j % 2>([&](auto k) { add<false, j* decltype(k){}>(y[j], j % 2 ? difference[k] : sum[k]); });
    });
  }
  static NASDET_INLINE void sines_back(const Lane (&x)[kLast + 1], Lane* y) {
    Lane sum[kQuarter], difference[kQuarter - 1];  // of frequencies k + 1
    unroll<kQuarter - 1>(
        [&](auto i) { sum[i] = x[i + 1] + x[kLast - 1 - i], difference[i] = x[i + 1] - x[kLast - 1 - i]; });
    sum[kQuarter - 1] = x[kQuarter];
    y[0] = Lane{};
    unroll<R>([&](auto r) {
      constexpr int j = r + 1;
      y[j] = Lane{};
      unroll<kQuarter - 1 + j % 2>(
          [&](auto i) { add<true, j*(decltype(i){} + 1)>(y[j], j % 2 ? sum[i] : difference[i]); });
    });
  }

  // The frequency re - i minus_im as the factor of a map's gradient, or its conjugate as that of a map.
  template <bool kGradient> static NASDET_INLINE void put(float* p, Lane re, Lane minus_im) {
    store(p, re), store(p + kPlane, kGradient ? -minus_im : minus_im);
  }

  // The planes of a step: one complex column, or the two real ones.
  template <bool kGradient> static NASDET_INLINE void complex_planes(const Column& column, float* p) {
    const auto bins = [&](auto k, Lane a, Lane b, Lane d, Lane e) {  // frequencies k and T - k
      constexpr int at = decltype(k){};
      if constexpr (at % kLast == 0) {
        put<kGradient>(p + 2 * at * kPlane, a, b);
      } else {
        put<kGradient>(p + 2 * at * kPlane, a - e, b + d);
        put<kGradient>(p + 2 * (T - at) * kPlane, a + e, b - d);
      }
    };
    unroll<kQuarter + 1>([&](auto k) {
      Lane a[2], b[2], d[2], e[2];
      cosines<decltype(k){}>(column.part(0), a[0], a[1]), cosines<decltype(k){}>(column.part(1), b[0], b[1]);
      sines<decltype(k){}>(column.part(2), d[0], d[1]), sines<decltype(k){}>(column.part(3), e[0], e[1]);
      bins(k, a[0], b[0], d[0], e[0]);
      if constexpr (decltype(k){} < kQuarter) bins(Constant<kLast - decltype(k){}>{}, a[1], b[1], d[1], e[1]);
    });
  }
  template <bool kGradient> static NASDET_APART void real_planes(const Column& column, int last, float* planes) {
    float* const p = planes + 2 * (last * (kLast - 1) - 1) * kPlane;
    float* const real = planes + (4 * (kLast - 1) + 2 * last) * kPlane;
    const auto bin = [&](auto k, Lane a, Lane d) {
      constexpr int at = decltype(k){};
      if constexpr (at % kLast == 0) store(real + at / kLast * kPlane, a);
      else put<kGradient>(p + 2 * at * kPlane, a, d);
    };
    unroll<kQuarter + 1>([&](auto k) {
      Lane a[2], d[2];
      cosines<decltype(k){}>(column.part(0), a[0], a[1]), sines<decltype(k){}>(column.part(2), d[0], d[1]);
      bin(k, a[0], d[0]);
      if constexpr (decltype(k){} < kQuarter) bin(Constant<kLast - decltype(k){}>{}, a[1], d[1]);
    });
  }

  // Of products with a conjugated factor; T * T / 2 times the taps.
  static NASDET_INLINE void complex_planes_back(const float* p, Column& column) {
    Lane a[kLast + 1], b[kLast + 1], d[kLast + 1], e[kLast + 1];
    unroll<kLast + 1>([&](auto k) {
      a[k] = load(p + 2 * k * kPlane), b[k] = -load(p + (2 * k + 1) * kPlane);
      if constexpr (decltype(k){} % kLast != 0) {
        const Lane re = load(p + 2 * (T - k) * kPlane), im = load(p + (2 * (T - k) + 1) * kPlane);
        e[k] = re - a[k], d[k] = im + b[k], a[k] += re, b[k] -= im;
      }
    });
    cosines_back(a, column.part(0)), cosines_back(b, column.part(1)), sines_back(d, column.part(2)),
        sines_back(e, column.part(3));
  }
  static NASDET_APART void real_planes_back(const float* planes, int last, Column& column) {
    const float* const p = planes + 2 * (last * (kLast - 1) - 1) * kPlane;
    const float* const real = planes + (4 * (kLast - 1) + 2 * last) * kPlane;
    Lane a[kLast + 1], d[kLast + 1];
    a[0] = .5f * load(real), a[kLast] = .5f * load(real + kPlane);
    unroll<kLast - 1>([&](auto i) {
      constexpr int k = i + 1;
      a[k] = load(p + 2 * k * kPlane), d[k] = -load(p + (2 * k + 1) * kPlane);
    });
    column = {};
    cosines_back(a, column.part(0)), sines_back(d, column.part(2));
  }
};

}  // namespace
}  // namespace nasdet::NASDET_ISA
