// exp, log1p and log of vectors on the ranges that losses need: errors of at most 2 ulp (tests/ops/test_simd_math.py).
// The coefficients are those of the polynomials with the smallest largest relative error, found by Remez exchange.
#pragma once
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {

template <class T> struct MathTraits;

template <> struct MathTraits<float> {
  typedef vec_u32 bits;
  typedef vec_i32 integers;
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr uint32_t kMantissaMask = 0x7fffffu, kOne = 0x3f800000u;
  static constexpr float kLowestExponent = -87.0f;  // its exp is the smallest result: 1.6e-38, a normal number
  static constexpr float kInverseLn2 = 1.44269504f;
  static constexpr float kShift =
      12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 1.42860682031e-6f;  // an integer times the first is exact
  static constexpr float kExp[] = {
      1.0f, 1.0f, 0.499999920718f, 0.166664200624f, 0.0416682266745f, 0.00837482461032f, 0.00138368143581f};
  static constexpr float kLog1p[] = {1.0f,
                                     -0.499999024269f,
                                     0.333299624872f,
                                     -0.249541342747f,
                                     0.196759424417f,
                                     -0.153056023816f,
                                     0.106036728958f,
                                     -0.0569597262235f,
                                     0.0198515717068f,
                                     -0.00324405089213f};
};

template <> struct MathTraits<double> {
  typedef uint64_t bits __attribute__((vector_size(kBytes)));
  typedef int64_t integers __attribute__((vector_size(kBytes)));
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr uint64_t kMantissaMask = 0xfffffffffffffull, kOne = 0x3ff0000000000000ull;
  static constexpr double kLowestExponent = -708.0;
  static constexpr double kInverseLn2 = 1.4426950408889634;
  static constexpr double kShift = 6755399441055744.0 + 1023;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 5.4979230187083711747e-14;
  static constexpr double kExp[] = {1.0,
                                    1.0,
                                    0.500000000000001770486,
                                    0.166666666666661684339,
                                    0.0416666666664926207707,
                                    0.00833333333355935835888,
                                    0.00138888889512626908264,
                                    0.000198412694325754567162,
                                    0.0000248014864801524534542,
                                    0.00000275576225575811253998,
                                    2.7632308537349561312e-7,
                                    2.49943163277611742671e-8};
  static constexpr double kLog1p[] = {1.0,
                                      -0.499999999999998530376,
                                      0.333333333333092165612,
                                      -0.249999999984227780617,
                                      0.199999999451526528854,
                                      -0.166666654932012967704,
                                      0.142856974241991029675,
                                      -0.124998275802164329805,
                                      0.111098043346703567099,
                                      -0.0999243748663615722188,
                                      0.0905673067238711217835,
                                      -0.0821056973242672343442,
                                      0.0733685329646974288217,
                                      -0.0630297848682404677923,
                                      0.0502807661520386288083,
                                      -0.0357581497490442791183,
                                      0.0217081145878215342008,
                                      -0.0107439685268554488109,
                                      0.00410986418052397572025,
                                      -0.00112993472119254537543,
                                      0.000197504474860925493706,
                                      -0.0000164181228164400302867};
};

// sum_i c[kFirst + i] x^i
template <class T, int kFirst = 0, int kTerms> NASDET_INLINE vec<T> polynomial(const T (&c)[kTerms], vec<T> x) {
  vec<T> sum = splat<T>(c[kTerms - 1]);
#pragma GCC unroll 32
  for (int i = kTerms - 2; i >= kFirst; --i) sum = sum * x + c[i];
  return sum;
}

// exp(v) for v <= 0. Below kLowestExponent it stays at that exponent's value, which is not 0: quotients stay finite.
template <class T> NASDET_INLINE vec<T> exp_nonpositive(vec<T> v) {
  using M = MathTraits<T>;
  const vec<T> lowest = splat<T>(M::kLowestExponent);
  v = v < lowest ? lowest : v;  // NaN stays
  const vec<T> shifted = v * M::kInverseLn2 + M::kShift;
  const vec<T> k = shifted - M::kShift;
  const vec<T> rest = (v - k * M::kLn2High) - k * M::kLn2Low;
  const vec<T> two_to_the_k = (vec<T>)((typename M::bits)shifted << M::kMantissaBits);
  return polynomial<T>(M::kExp, rest) * two_to_the_k;
}

// log(1 + v) for 0 <= v <= 1.
template <class T> NASDET_INLINE vec<T> log1p_unit(vec<T> v) {
  return v + v * v * polynomial<T, 1>(MathTraits<T>::kLog1p, v);  // v unrounded: its coefficient is 1
}

// log(v) of positive normal numbers; the error is absolute, of 2 ulp of max(1, |log(v)|).
template <class T> NASDET_INLINE vec<T> log_normal(vec<T> v) {
  using M = MathTraits<T>;
  const typename M::bits bits = (typename M::bits)v;
  const vec<T> mantissa = (vec<T>)((bits & M::kMantissaMask) | M::kOne);
  const vec<T> exponent = __builtin_convertvector((typename M::integers)(bits >> M::kMantissaBits) - M::kBias, vec<T>);
  return exponent * M::kLn2High + (exponent * M::kLn2Low + log1p_unit<T>(mantissa - T(1)));
}

}  // namespace nasdet::NASDET_ISA
