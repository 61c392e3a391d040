// Discrete Fourier transforms of a few points, one per lane: loops are unrolled and values stay in registers where they fit.
#pragma once
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {
namespace {

using Lane = vec<float>;
constexpr int kFloats = kLanes<float>;

template <int... I> struct Indices {};
template <class A, class B> struct Joined;
template <int... A, int... B> struct Joined<Indices<A...>, Indices<B...>> {
  using type = Indices<A..., (int(sizeof...(A)) + B)...>;
};
template <int N> struct Counted {
  using type = typename Joined<typename Counted<N / 2>::type, typename Counted<N - N / 2>::type>::type;
};
template <> struct Counted<0> { using type = Indices<>; };
template <> struct Counted<1> { using type = Indices<0>; };
template <int I> struct Constant {
  constexpr operator int() const { return I; }
};

template <class F, int... I> NASDET_INLINE void call_each(const F& f, Indices<I...>) { (f(Constant<I>{}), ...); }
template <int N, class F> NASDET_INLINE void unroll(const F& f) { call_each(f, typename Counted<N>::type{}); }

constexpr double kTau = 6.283185307179586476925286766559;

// cos(tau k / n) by its series after reduction to an eighth of the circle.
constexpr double cosine(int k, int n) {
  k = (k < 0 ? -k : k) % n;
  if (2 * k > n) k = n - k;
  if (4 * k > n) return -cosine(n - 2 * k, 2 * n);
  const bool from_sine = 8 * k > n;
  const double x = from_sine ? kTau * (n - 4 * k) / (4 * n) : kTau * k / n;
  double term = from_sine ? x : 1, sum = term;
  for (int i = from_sine ? 2 : 1; i < 24; i += 2) sum += term *= -x * x / (i * (i + 1));
  return sum;
}
constexpr double sine(int k, int n) { return cosine(4 * k - n, 4 * n); }

template <int N> struct Complexes { Lane re[N], im[N]; };
template <int N> struct Reals { Lane at[N]; };

// plus, minus = a +- w b where w = exp(kSign tau i K / N). The larger part of w is taken out of the product, which leaves
// six multiply-adds.
template <int K, int N, int kSign>
NASDET_INLINE void butterfly(Lane a_re, Lane a_im, Lane b_re, Lane b_im, Lane& plus_re, Lane& plus_im, Lane& minus_re,
                             Lane& minus_im) {
  if constexpr (K == 0) {
    plus_re = a_re + b_re, plus_im = a_im + b_im, minus_re = a_re - b_re, minus_im = a_im - b_im;
  } else if constexpr (4 * K == N && kSign > 0) {
    plus_re = a_re - b_im, plus_im = a_im + b_re, minus_re = a_re + b_im, minus_im = a_im - b_re;
  } else if constexpr (4 * K == N) {
    plus_re = a_re + b_im, plus_im = a_im - b_re, minus_re = a_re - b_im, minus_im = a_im + b_re;
  } else {
    constexpr double c = cosine(K, N), s = kSign * sine(K, N);
    constexpr bool by_cosine = c * c >= s * s;
    constexpr float factor = float(by_cosine ? c : s), ratio = float(by_cosine ? s / c : c / s);
    const Lane u_re = by_cosine ? b_re - ratio * b_im : ratio * b_re - b_im;
    const Lane u_im = by_cosine ? b_im + ratio * b_re : ratio * b_im + b_re;
    plus_re = a_re + factor * u_re, plus_im = a_im + factor * u_im;
    minus_re = a_re - factor * u_re, minus_im = a_im - factor * u_im;
  }
}

// sum_j x_j exp(kSign tau i j k / N).
template <int N, int kSign> NASDET_INLINE Complexes<N> fft(const Complexes<N>& x) {
  Complexes<N> y;
  if constexpr (N == 1) {
    y = x;
  } else if constexpr (N % 2 == 0) {
    constexpr int kHalf = N / 2;
    Complexes<kHalf> even, odd;
    unroll<kHalf>([&](auto j) {
      even.re[j] = x.re[2 * j], even.im[j] = x.im[2 * j];
      odd.re[j] = x.re[2 * j + 1], odd.im[j] = x.im[2 * j + 1];
    });
    even = fft<kHalf, kSign>(even);
    odd = fft<kHalf, kSign>(odd);
    unroll<kHalf>([&](auto k) {
      butterfly<decltype(k){}, N, kSign>(even.re[k], even.im[k], odd.re[k], odd.im[k], y.re[k], y.im[k],
                                         y.re[k + kHalf], y.im[k + kHalf]);
    });
  } else {  // odd: inputs j and N - j together
    constexpr int kHalf = N / 2;
    Lane sum_re[kHalf], sum_im[kHalf], difference_re[kHalf], difference_im[kHalf];
    y.re[0] = x.re[0], y.im[0] = x.im[0];
    unroll<kHalf>([&](auto i) {
      constexpr int j = i + 1;
      sum_re[i] = x.re[j] + x.re[N - j], sum_im[i] = x.im[j] + x.im[N - j];
      difference_re[i] = x.re[j] - x.re[N - j], difference_im[i] = x.im[j] - x.im[N - j];
      y.re[0] += sum_re[i], y.im[0] += sum_im[i];
    });
    unroll<kHalf>([&](auto i) {
      constexpr int k = i + 1;
      Lane a_re = x.re[0], a_im = x.im[0], b_re{}, b_im{};
      unroll<kHalf>([&](auto m) {
        constexpr int j = m + 1;
        constexpr float c = float(cosine(j * k, N)), s = float(kSign * sine(j * k % N, N));
        a_re += c * sum_re[m], a_im += c * sum_im[m], b_re += s * difference_im[m], b_im += s * difference_re[m];
      });
      y.re[k] = a_re - b_re, y.im[k] = a_im + b_im;
      y.re[N - k] = a_re + b_re, y.im[N - k] = a_im - b_im;
    });
  }
  return y;
}

// The first N / 2 + 1 frequencies of real inputs with sign -1. The imaginary parts of frequency 0 and,
// for even N, N / 2 are zero and not to be read.
template <int N> NASDET_INLINE Complexes<N / 2 + 1> real_fft(const Reals<N>& x) {
  Complexes<N / 2 + 1> y;
  if constexpr (N == 1) {
    y.re[0] = x.at[0];
  } else if constexpr (N == 2) {
    y.re[0] = x.at[0] + x.at[1], y.re[1] = x.at[0] - x.at[1];
  } else if constexpr (N % 2 == 0) {
    constexpr int kHalf = N / 2;
    Reals<kHalf> even_x, odd_x;
    unroll<kHalf>([&](auto j) { even_x.at[j] = x.at[2 * j], odd_x.at[j] = x.at[2 * j + 1]; });
    const auto even = real_fft<kHalf>(even_x), odd = real_fft<kHalf>(odd_x);
    unroll<N / 4 + 1>([&](auto index) {
      constexpr int k = index;
      if constexpr (k == 0) y.re[0] = even.re[0] + odd.re[0], y.re[kHalf] = even.re[0] - odd.re[0];
      else if constexpr (4 * k == N) y.re[k] = even.re[k], y.im[k] = -odd.re[k];
      else {
        Lane minus_im;
        butterfly<k, N, -1>(even.re[k], even.im[k], odd.re[k], odd.im[k], y.re[k], y.im[k], y.re[kHalf - k], minus_im);
        y.im[kHalf - k] = -minus_im;
      }
    });
  } else {
    constexpr int kHalf = N / 2;
    Lane sum[kHalf], difference[kHalf];
    y.re[0] = x.at[0];
    unroll<kHalf>([&](auto i) {
      constexpr int j = i + 1;
      sum[i] = x.at[j] + x.at[N - j], difference[i] = x.at[j] - x.at[N - j];
      y.re[0] += sum[i];
    });
    unroll<kHalf>([&](auto i) {
      constexpr int k = i + 1;
      Lane re = x.at[0], im{};
      unroll<kHalf>([&](auto m) {
        constexpr int j = m + 1;
        constexpr float c = float(cosine(j * k, N)), s = float(sine(j * k % N, N));
        re += c * sum[m], im -= s * difference[m];
      });
      y.re[k] = re, y.im[k] = im;
    });
  }
  return y;
}

// The N real values with those frequencies, times N.
template <int N> NASDET_INLINE Reals<N> real_ifft(const Complexes<N / 2 + 1>& x) {
  Reals<N> y;
  if constexpr (N == 1) {
    y.at[0] = x.re[0];
  } else if constexpr (N == 2) {
    y.at[0] = x.re[0] + x.re[1], y.at[1] = x.re[0] - x.re[1];
  } else if constexpr (N % 2 == 0) {
    constexpr int kHalf = N / 2;
    Complexes<N / 4 + 1> even, odd;
    unroll<N / 4 + 1>([&](auto index) {
      constexpr int k = index;
      if constexpr (k == 0) even.re[0] = x.re[0] + x.re[kHalf], odd.re[0] = x.re[0] - x.re[kHalf];
      else if constexpr (4 * k == N) even.re[k] = x.re[k] + x.re[k], odd.re[k] = -2.f * x.im[k];
      else {
        constexpr float c = float(cosine(k, N)), s = float(sine(k, N));
        const Lane re = x.re[k] - x.re[kHalf - k], im = x.im[k] + x.im[kHalf - k];
        even.re[k] = x.re[k] + x.re[kHalf - k], even.im[k] = x.im[k] - x.im[kHalf - k];
        odd.re[k] = c * re - s * im, odd.im[k] = c * im + s * re;
      }
    });
    const auto even_y = real_ifft<kHalf>(even), odd_y = real_ifft<kHalf>(odd);
    unroll<kHalf>([&](auto j) { y.at[2 * j] = even_y.at[j], y.at[2 * j + 1] = odd_y.at[j]; });
  } else {
    constexpr int kHalf = N / 2;
    y.at[0] = x.re[0];
    unroll<kHalf>([&](auto i) { y.at[0] += 2.f * x.re[i + 1]; });
    unroll<kHalf>([&](auto i) {
      constexpr int j = i + 1;
      Lane a = x.re[0], b{};
      unroll<kHalf>([&](auto m) {
        constexpr int k = m + 1;
        constexpr float c = float(2 * cosine(j * k, N)), s = float(2 * sine(j * k % N, N));
        a += c * x.re[k], b += s * x.im[k];
      });
      y.at[j] = a - b, y.at[N - j] = a + b;
    });
  }
  return y;
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
