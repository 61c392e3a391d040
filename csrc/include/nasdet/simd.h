// Vectors as wide as the instruction set that this file is compiled for, and loads and stores that convert between the
// stored type (float, double, bfloat16, half) and the type of the arithmetic (float; double for double).
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nasdet {

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

namespace NASDET_ISA {

#if defined(__AVX512F__)
inline constexpr int kBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kBytes = 32;
#else
inline constexpr int kBytes = 16;
#endif

#define NASDET_INLINE __attribute__((always_inline)) inline

template <class Stored> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <class Stored> using arithmetic_t = typename Arithmetic<Stored>::type;

template <class T> struct VecOf;
template <> struct VecOf<float> { typedef float type __attribute__((vector_size(kBytes))); };
template <> struct VecOf<double> { typedef double type __attribute__((vector_size(kBytes))); };
template <class T> using vec = typename VecOf<T>::type;  // vec<float>: 16, 8 or 4 lanes
template <class T> inline constexpr int kLanes = kBytes / int(sizeof(T));
template <class Stored> inline constexpr int kWidth = kLanes<arithmetic_t<Stored>>;  // elements in one load

typedef uint32_t vec_u32 __attribute__((vector_size(kBytes)));
typedef int32_t vec_i32 __attribute__((vector_size(kBytes)));
typedef uint16_t vec_u16 __attribute__((vector_size(kBytes / 2)));

NASDET_INLINE vec_u32 widened_words(vec_u16 narrow) {  // GCC would take a vector of 64 bytes in two halves
#if defined(__AVX512F__)
  return (vec_u32)_mm512_cvtepu16_epi32((__m256i)narrow);
#else
  return __builtin_convertvector(narrow, vec_u32);
#endif
}

template <class T> NASDET_INLINE vec<T> splat(T value) {
  return value - vec<T>{};
}  // x + 0 would be an addition: of -0

NASDET_INLINE float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float out;
  uint32_t word;
  if (exponent == 31) word = sign | 0x7f800000u | (mantissa << 13);
  else if (exponent) word = sign | ((exponent + 112) << 23) | (mantissa << 13);
  else {
    out = float(mantissa) * 5.9604644775390625e-8f;  // subnormal: mantissa * 2^-24
    return sign ? -out : out;
  }
  __builtin_memcpy(&out, &word, 4);
  return out;
}

NASDET_INLINE uint16_t float_to_half(float value) {  // round to nearest even
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  const uint16_t sign = uint16_t((word >> 16) & 0x8000);
  const uint32_t magnitude = word & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // subnormal or zero: let the float adder round at 2^-24
    float absolute;
    __builtin_memcpy(&absolute, &magnitude, 4);
    absolute += 0.5f;
    uint32_t rounded;
    __builtin_memcpy(&rounded, &absolute, 4);
    return uint16_t(sign | (rounded - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

template <class Stored> NASDET_INLINE vec<arithmetic_t<Stored>> load(const Stored* p);

template <> NASDET_INLINE vec<float> load<float>(const float* p) {
  vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <> NASDET_INLINE vec<double> load<double>(const double* p) {
  vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <> NASDET_INLINE vec<float> load<BFloat16>(const BFloat16* p) {
  vec_u16 narrow;
  __builtin_memcpy(&narrow, p, sizeof narrow);
  return (vec<float>)(widened_words(narrow) << 16);
}
template <> NASDET_INLINE vec<float> load<Half>(const Half* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

// 2 kWidth consecutive elements as two vectors, in whatever order is cheapest: for sums, where order does not matter.
template <class Stored>
NASDET_INLINE void load_pair(const Stored* p, vec<arithmetic_t<Stored>>& a, vec<arithmetic_t<Stored>>& b) {
  a = load(p);
  b = load(p + kWidth<Stored>);
}
template <>
NASDET_INLINE void load_pair<BFloat16>(const BFloat16* p, vec<float>& a, vec<float>& b) {  // even and odd elements
  vec_u32 both;
  __builtin_memcpy(&both, p, sizeof both);
  a = (vec<float>)(both << 16);
  b = (vec<float>)(both & 0xffff0000u);
}

// *p in every lane, by the load itself: splat(*p) subtracts a zero, on the units that products need.
NASDET_INLINE vec<float> broadcast(const float* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (vec<float>)_mm256_broadcast_ss(p);
#else
  return splat(*p);
#endif
}

// A vector in its stored form.
template <class Stored> struct Narrow { using type = vec_u16; };
template <> struct Narrow<float> { using type = vec<float>; };
template <> struct Narrow<double> { using type = vec<double>; };

template <class Stored> NASDET_INLINE typename Narrow<Stored>::type narrow(vec<arithmetic_t<Stored>> v);

template <> NASDET_INLINE vec<float> narrow<float>(vec<float> v) { return v; }
template <> NASDET_INLINE vec<double> narrow<double>(vec<double> v) { return v; }
template <> NASDET_INLINE vec_u16 narrow<BFloat16>(vec<float> v) {  // round to nearest even; NaN stays a quiet NaN
#if defined(__AVX512BF16__)
  return (vec_u16)_mm512_cvtneps_pbh((__m512)v);
#else
  const vec_u32 bits = (vec_u32)v;
  const vec_u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vec_u32 quiet = (bits >> 16) | 0x40u;
  const vec_u32 is_nan = (vec_u32)(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), vec_u16);
#endif
}
template <> NASDET_INLINE vec_u16 narrow<Half>(vec<float> v) {
#if defined(__AVX512F__)
  return (vec_u16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (vec_u16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vec_u16 out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = float_to_half(v[i]);
  return out;
#endif
}

template <class Stored> NASDET_INLINE void store(Stored* p, vec<arithmetic_t<Stored>> v) {
  const auto bits = narrow<Stored>(v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// A store that bypasses the caches: for outputs larger than them. `p` must be aligned to one store.
template <class Stored> NASDET_INLINE void store_streaming(Stored* p, vec<arithmetic_t<Stored>> v) {
  const auto bits = narrow<Stored>(v);
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)bits);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof bits == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof bits == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
#endif
  __builtin_memcpy(p, &bits, sizeof bits);
}

template <bool kStreaming, class Stored> NASDET_INLINE void store_to(Stored* p, vec<arithmetic_t<Stored>> v) {
  if constexpr (kStreaming) store_streaming(p, v);
  else store(p, v);
}

// Bit i is set when a[i] == b[i].
template <class T> NASDET_INLINE uint32_t equal_bits(vec<T> a, vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
#else
  const auto equal = a == b;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return uint32_t(_mm256_movemask_ps((__m256)equal));
  else return uint32_t(_mm256_movemask_pd((__m256d)equal));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return uint32_t(_mm_movemask_ps((__m128)equal));
  else return uint32_t(_mm_movemask_pd((__m128d)equal));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= uint32_t(equal[i] != 0) << i;
  return bits;
#endif
#endif
}

NASDET_INLINE void streaming_fence() {  // makes streaming stores visible before the kernel returns
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first `count` < kWidth elements; the other lanes are zero and nothing beyond them is touched.
template <class Stored> NASDET_INLINE vec<arithmetic_t<Stored>> load_part(const Stored* p, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(Stored) == 2) {  // masked lanes are not touched, not even by a fault
    alignas(32) Stored lanes[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    return load(lanes);
  } else if constexpr (sizeof(Stored) == 4) {
    return (vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  }
#endif
  Stored padded[kWidth<Stored>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}
template <class Stored> NASDET_INLINE void store_part(Stored* p, vec<arithmetic_t<Stored>> v, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(Stored) == 2) {
    return _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)narrow<Stored>(v));
  } else if constexpr (sizeof(Stored) == 4) {
    return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  }
#endif
  Stored padded[kWidth<Stored>];
  store(padded, v);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// The first `count` elements, all of a vector or none included.
template <class Stored> NASDET_INLINE vec<arithmetic_t<Stored>> load_up_to(const Stored* p, int64_t count) {
  return count >= kWidth<Stored> ? load(p) : count > 0 ? load_part(p, count) : vec<arithmetic_t<Stored>>{};
}
template <class Stored> NASDET_INLINE void store_up_to(Stored* p, vec<arithmetic_t<Stored>> v, int64_t count) {
  if (count >= kWidth<Stored>) store(p, v);
  else if (count > 0) store_part(p, v, count);
}

template <class T> NASDET_INLINE T horizontal_sum(vec<T> v) {
  T lanes[kLanes<T>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int step = kLanes<T> / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

}  // namespace NASDET_ISA
}  // namespace nasdet
