// Lane-wise minimum, maximum and comparison for the suppression kernels. Kernel code: no header but <cstdint> and ours.
#pragma once
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {

NASDET_INLINE vec<float> lane_min(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vec<float>)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
NASDET_INLINE vec<double> lane_min(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (vec<double>)_mm_min_pd((__m128d)a, (__m128d)b);
#else
  return a < b ? a : b;
#endif
}
NASDET_INLINE vec<float> lane_max(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vec<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
NASDET_INLINE vec<double> lane_max(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (vec<double>)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

// Bit i is set when a[i] > b[i].
NASDET_INLINE uint32_t greater_bits(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= uint32_t(a[i] > b[i]) << i;
  return bits;
#endif
}
NASDET_INLINE uint32_t greater_bits(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, (__m128d)b)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= uint32_t(a[i] > b[i]) << i;
  return bits;
#endif
}

typedef uint64_t vec_u64 __attribute__((vector_size(kBytes)));
inline constexpr int kWords = kBytes / 8;  // 64-bit words of a vector

NASDET_INLINE vec_u64 load_words(const uint64_t* p) {
  vec_u64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
NASDET_INLINE bool any_bit(vec_u64 v) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  uint64_t all = 0;
  for (int i = 0; i < kWords; ++i) all |= v[i];
  return all != 0;
#endif
}

}  // namespace nasdet::NASDET_ISA
