// Tiles of groups of few channels: vectors as long as the groups are wide, weights in registers, more pixels.
#pragma once
#include "conv_direct_pixels.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kMostPixels = 12;                                // of a tile of any form
constexpr int kNarrowPixels = kBytes == 64 ? kMostPixels : 8;  // as many chains of sums as registers hold

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// A tap as a tile sees it: its source pixels, what to add to a channel of the panel's, and the weights' row.
template <class A> struct TileTap {
  const A* pixel[kMostPixels];
  int64_t offset, count, row;
};

template <int kCount> struct Lanes { typedef float type __attribute__((vector_size(4 * kCount))); };

// sum += x * g; of pairs of bfloat16 where kPairs.
template <bool kPairs, class T, class V> NASDET_INLINE void add_product(V& sum, const T& x, const V& g) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    int32_t two;
    __builtin_memcpy(&two, &x, sizeof two);
    if constexpr (sizeof(V) == 64)
      sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)g);
    else if constexpr (sizeof(V) == 32)
      sum = (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_epi32(two), (__m256bh)g);
    else sum = (V)_mm_dpbf16_ps((__m128)sum, (__m128bh)_mm_set1_epi32(two), (__m128bh)g);
    return;
  }
#endif
  sum += spread<V>(x) * g;
}

template <int kCount>
NASDET_INLINE void narrow_store(float* p, typename Lanes<kCount>::type v, int64_t width, bool accumulate) {
  using V = typename Lanes<kCount>::type;
  if (width == kCount) {
    if (accumulate) {
      V before;
      __builtin_memcpy(&before, p, sizeof before);
      v += before;
    }
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    for (int64_t i = 0; i < width; ++i) p[i] = accumulate ? p[i] + v[i] : v[i];
  }
}

// A whole sum, rounded.
template <int kCount>
NASDET_INLINE void narrow_store([[maybe_unused]] BFloat16* p, [[maybe_unused]] typename Lanes<kCount>::type v,
                                [[maybe_unused]] int64_t width, bool) {
#if defined(__AVX512BF16__)
  vec<float> wide;
  if constexpr (kCount == 16) wide = v;
  else if constexpr (kCount == 8) wide = (vec<float>)_mm512_castps256_ps512((__m256)v);
  else wide = (vec<float>)_mm512_castps128_ps512((__m128)v);
  const vec_u16 rounded = narrow<BFloat16>(wide);
  if (width == kCount) __builtin_memcpy(p, &rounded, 2 * kCount);
  else store_part(p, wide, width);
#endif
}

// The 32 bits of two bfloat16.
NASDET_INLINE float both(const BFloat16* p) {
  float two;
  __builtin_memcpy(&two, p, sizeof two);
  return two;
}
NASDET_INLINE float both(const float* p) { return *p; }

// sums[pixel] += over kRows rows of weights, which stay in registers. A row is one source channel, or two of bfloat16.
// Pixels are taken four at a time: so many pointers fit registers.
template <class V, int kRows, class A>
NASDET_INLINE void narrow_rows(const A* const* pixel, int64_t offset, const float* w, V* sum) {
  constexpr bool kPairs = sizeof(A) == 2;
  V row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(&row[r], w + r * int(sizeof(V) / 4), sizeof(V));
#pragma GCC unroll 3
  for (int i = 0; i < kNarrowPixels; i += 4) {
    const A *a = pixel[i] + offset, *b = pixel[i + 1] + offset, *c = pixel[i + 2] + offset, *d = pixel[i + 3] + offset;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      constexpr int kStep = kPairs ? 2 : 1;
      add_product<kPairs>(sum[i], both(a + r * kStep), row[r]);
      add_product<kPairs>(sum[i + 1], both(b + r * kStep), row[r]);
      add_product<kPairs>(sum[i + 2], both(c + r * kStep), row[r]);
      add_product<kPairs>(sum[i + 3], both(d + r * kStep), row[r]);
    }
  }
}

// to[pixel][channel] = (or +=) the sum over taps and source channels of one group. kRows: of every tap, 0: any number.
template <int kCount, int kRows, class A, class Out>
__attribute__((noinline)) void narrow_tile(const TileTap<A>* taps, int64_t count, int64_t source, const float* weights,
                                           Out* const* to, int64_t width, bool accumulate) {
  using V = typename Lanes<kCount>::type;
  constexpr int64_t kStep = sizeof(A) == 2 ? 2 : 1;  // source channels of a row
  V sum[kNarrowPixels] = {};
  for (int64_t t = 0; t < count; ++t) {
    const float* w = weights + taps[t].row / kStep * kCount;
    const int64_t end = taps[t].offset + source + taps[t].count;
    int64_t k = end - taps[t].count;
    if constexpr (kRows > 0) {
      narrow_rows<V, kRows>(taps[t].pixel, k, w, sum);
      continue;
    }
    if constexpr (kBytes == 64)
      for (; k + 8 * kStep <= end; k += 8 * kStep, w += 8 * kCount) narrow_rows<V, 8>(taps[t].pixel, k, w, sum);
    for (; k + 4 * kStep <= end; k += 4 * kStep, w += 4 * kCount) narrow_rows<V, 4>(taps[t].pixel, k, w, sum);
    for (; k < end; k += kStep, w += kCount) narrow_rows<V, 1>(taps[t].pixel, k, w, sum);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kNarrowPixels; ++i) narrow_store<kCount>(to[i], sum[i], width, accumulate);
}

// `channels`: of every tap, or 0.
template <int kCount, class A, class Out>
void narrow_panel(const TileTap<A>* taps, int64_t count, int64_t channels, const ConvPanel& panel, Out* const* to,
                  int64_t width, bool accumulate) {
  const auto run = [&](auto tile) {
    tile(taps, count, panel.source, static_cast<const float*>(panel.weights), to, width, accumulate);
  };
  if constexpr (sizeof(A) == 2)
    if (channels == 16) return run(narrow_tile<kCount, 8, A, Out>);
  if (channels == 8) return run(narrow_tile < kCount, sizeof(A) == 2 ? 4 : 8, A, Out >);
  if (channels == 4) return run(narrow_tile < kCount, sizeof(A) == 2 ? 2 : 4, A, Out >);
  run(narrow_tile<kCount, 0, A, Out>);
}

template <class A, class Out>
void narrow_panel(const TileTap<A>* taps, int64_t count, int64_t channels, const ConvPanel& panel, Out* const* to,
                  int64_t width, bool accumulate) {
  if (panel.width <= 4) return narrow_panel<4>(taps, count, channels, panel, to, width, accumulate);
  if constexpr (kBytes >= 32) {
    if (panel.width <= 8) return narrow_panel<8>(taps, count, channels, panel, to, width, accumulate);
  }
  if constexpr (kBytes >= 64) narrow_panel<16>(taps, count, channels, panel, to, width, accumulate);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
