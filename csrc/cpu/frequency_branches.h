// The branches' weights, [out][in][3][3], to folded terms and back. It goes block by block of vectors of outputs and of
// inputs, branch by branch: nine taps of a pair of channels are nine terms, to which every branch adds its own.
#pragma once
#include "frequency_tile.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kTaps = 9;
constexpr int kTermRows = 8;  // whose terms stay in the innermost cache while all branches add to them

NASDET_INLINE void transpose(Lane (&rows)[kFloats]) {
#if defined(__AVX512F__)
  unroll<4>([&](auto level) {
    constexpr int kStep = 1 << level;
    vec_i32 low, high;  // lanes of row i and of row i + kStep (counted from 16)
    for (int l = 0; l < kFloats; ++l)
      low[l] = l & kStep ? kFloats + l - kStep : l, high[l] = l & kStep ? kFloats + l : l + kStep;
    unroll<kFloats>([&](auto index) {
      constexpr int i = index;
      if constexpr ((i & kStep) == 0) {
        const __m512 a = (__m512)rows[i], b = (__m512)rows[i + kStep];
        rows[i] = (Lane)_mm512_permutex2var_ps(a, (__m512i)low, b);
        rows[i + kStep] = (Lane)_mm512_permutex2var_ps(a, (__m512i)high, b);
      }
    });
  });
#else
  __m256 pairs[8], fours[8];
  unroll<4>([&](auto i) {
    pairs[2 * i] = _mm256_unpacklo_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps((__m256)rows[2 * i], (__m256)rows[2 * i + 1]);
  });
  unroll<2>([&](auto half) {
    unroll<2>([&](auto i) {
      const __m256 a = pairs[4 * half + i], b = pairs[4 * half + 2 + i];
      fours[4 * half + 2 * i] = _mm256_shuffle_ps(a, b, 0x44);
      fours[4 * half + 2 * i + 1] = _mm256_shuffle_ps(a, b, 0xee);
    });
  });
  unroll<4>([&](auto i) {
    rows[i] = (Lane)_mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
    rows[4 + i] = (Lane)_mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
  });
#endif
}

// Of four consecutive numbers for each lane, the first of them `stride` apart, vectors of the first to the fourth.
struct Quads {
#if defined(__AVX512F__)
  using Vector = __m512;
  static NASDET_INLINE Vector rows(const float* p, int64_t stride) {  // rows 0, 4, 8, 12 side by side
    const auto quad = [&](int row) { return _mm_loadu_ps(p + row * stride); };
    Vector v = _mm512_insertf32x4(_mm512_castps128_ps512(quad(0)), quad(4), 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(v, quad(8), 2), quad(12), 3);
  }
  static NASDET_INLINE Vector low(Vector a, Vector b) { return _mm512_unpacklo_ps(a, b); }
  static NASDET_INLINE Vector high(Vector a, Vector b) { return _mm512_unpackhi_ps(a, b); }
  template <int kHalves> static NASDET_INLINE Lane halves(Vector a, Vector b) {
    return (Lane)_mm512_shuffle_ps(a, b, kHalves);
  }
#else
  using Vector = __m256;
  static NASDET_INLINE Vector rows(const float* p, int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
  }
  static NASDET_INLINE Vector low(Vector a, Vector b) { return _mm256_unpacklo_ps(a, b); }
  static NASDET_INLINE Vector high(Vector a, Vector b) { return _mm256_unpackhi_ps(a, b); }
  template <int kHalves> static NASDET_INLINE Lane halves(Vector a, Vector b) {
    return (Lane)_mm256_shuffle_ps(a, b, kHalves);
  }
#endif
  Vector low01, low23, high01, high23;

  NASDET_INLINE Quads(const float* p, int64_t stride) {
    const Vector v0 = rows(p, stride), v1 = rows(p + stride, stride), v2 = rows(p + 2 * stride, stride),
                 v3 = rows(p + 3 * stride, stride);
    low01 = low(v0, v1), low23 = low(v2, v3), high01 = high(v0, v1), high23 = high(v2, v3);
  }
  NASDET_INLINE Lane first() const { return halves<0x44>(low01, low23); }
  NASDET_INLINE Lane second() const { return halves<0xee>(low01, low23); }
  NASDET_INLINE Lane third() const { return halves<0x44>(high01, high23); }
  NASDET_INLINE Lane fourth() const { return halves<0xee>(high01, high23); }
};

// A branch's nine terms, in the order of its `terms`: the centre's; even and odd in x of the taps beside it; even and odd in
// y of those above and below; of the corners' even in both, odd in x, in y, in both.
struct NineTaps { Lane at[kTaps]; };

NASDET_INLINE NineTaps load_taps(const float* p, int64_t stride) {
  const Quads a(p, stride), b(p + 4, stride), c(p + 5, stride);
  return {{a.first(), a.second(), a.third(), a.fourth(), b.first(), b.second(), b.third(), b.fourth(), c.fourth()}};
}
NASDET_INLINE NineTaps terms_of(const NineTaps& taps) {
  const Lane(&t)[kTaps] = taps.at;
  const Lane even_right = t[8] + t[2], even_left = t[6] + t[0], odd_right = t[8] - t[2], odd_left = t[6] - t[0];
  return {{t[4], t[5] + t[3], t[5] - t[3], t[7] + t[1], t[7] - t[1], even_right + even_left, even_right - even_left,
           odd_right + odd_left, odd_right - odd_left}};
}
// The transpose.
NASDET_INLINE NineTaps taps_of(const NineTaps& terms) {
  const Lane(&f)[kTaps] = terms.at;
  const Lane even_right = f[5] + f[6], even_left = f[5] - f[6], odd_right = f[7] + f[8], odd_left = f[7] - f[8];
  return {{even_left - odd_left, f[3] - f[4], even_right - odd_right, f[1] - f[2], f[0], f[1] + f[2],
           even_left + odd_left, f[3] + f[4], even_right + odd_right}};
}

// Where the terms of a row of the depth and a vector of the width lie.
struct Folded {
  int64_t depth, vectors, terms;
  float* first;

  explicit Folded(const FrequencyWeights& w)
      : depth(w.transposed ? w.outs : w.ins),
        vectors(((w.transposed ? w.ins : w.outs) + kFloats - 1) / kFloats),
        terms(w.fold.terms * kFloats),
        first(w.folded) {}
  float* at(int64_t row, int64_t vector) const { return first + (row * vectors + vector) * terms; }
};

// The weights that a branch has for kOuts outputs from `out` on, the `first` to the `last` of them, and kIns inputs.
template <int kOuts, int kIns> struct BranchBlock {
  static constexpr int kRow = kIns * kTaps;
  const FrequencyBranch& b;
  int first, last;
  int64_t row, taps, offset;  // from the branch's first weight to those of the block, which need not be in the branch

  BranchBlock(const FrequencyWeights& w, const FrequencyBranch& branch, int64_t out, int64_t in)
      : b(branch),
        first(inside(branch.first - out)),
        last(inside(branch.last - out)),
        row(w.in_channels * kTaps),
        taps((w.in_channels - in < kIns ? w.in_channels - in : kIns) * kTaps),
        offset((out - branch.first) * row + in * kTaps) {}
  static int inside(int64_t out) { return int(out > 0 ? out < kOuts ? out : kOuts : 0); }
  bool empty() const { return first >= last || taps <= 0; }

  // As [output][input][tap], zeros where there are none.
  NASDET_INLINE void copy(float (&to)[kOuts * kRow]) const {
    const float* const from = b.weight + offset;
    if (last - first < kOuts || taps < kRow) __builtin_memset(to, 0, sizeof(to));
    for (int o = first; o < last; ++o) {
      const float* const p = from + o * row;
      if (taps == kRow)  // memcpy would be a string instruction here, which waits for one line after the other
        unroll<kRow / 8>([&](auto i) { _mm256_storeu_ps(to + o * kRow + 8 * i, _mm256_loadu_ps(p + 8 * i)); });
      else __builtin_memcpy(to + o * kRow, p, size_t(taps) * sizeof(float));
    }
  }
  // A kTermRows-th of what lies `ahead`.
  NASDET_INLINE void prefetch(int64_t part, int64_t ahead) const {
    constexpr int kSome = kOuts / kTermRows;
    const float* const from = b.weight + offset + part * kSome * row + ahead;
    for (int o = 0; o < kSome; ++o)
      for (int i = 0; i < kRow; i += 16) __builtin_prefetch(from + o * row + i, 0, 2);
  }
};

// Terms of a block's rows of the depth and one vector of the width: of outputs, or for the map's gradient of inputs.
template <bool kTransposed>
NASDET_INLINE void fold_block(const FrequencyWeights& w, const Folded& folded, float scale, int64_t out, int64_t in,
                              int64_t ahead) {
  constexpr int kOuts = kTransposed ? kTermRows : kFloats, kIns = kTransposed ? kFloats : kTermRows;
  using Block = BranchBlock<kOuts, kIns>;
  constexpr int kNext = kTransposed ? Block::kRow : kTaps, kStride = kTransposed ? kTaps : Block::kRow;
  const int64_t row = kTransposed ? out : in, vector = (kTransposed ? in : out) / kFloats;
  const int64_t rows = folded.depth - row < kTermRows ? folded.depth - row : kTermRows;
  // Not from `folded` in the loops, which would read it again after every store.
  float* const first = folded.at(row, vector);
  const int64_t count = folded.terms, stride = folded.vectors * count;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; i += kFloats) store(first + r * stride + i, Lane{});
  for (int64_t n = 0; n < w.branch_count; ++n) {
    const Block block(w, w.branches[n], w.first_out + out, w.first_in + in);
    if (block.empty()) continue;
    alignas(64) float taps[kOuts * Block::kRow], factors[kOuts];
    block.copy(taps);
    const FrequencyBranch& b = w.branches[n];
    for (int o = 0; o < kOuts; ++o)
      factors[o] = o < block.first || o >= block.last ? 0
                   : b.mix                            ? scale * b.mix[w.first_out + out + o - b.first]
                                                      : scale;
    for (int64_t r = 0; r < rows; ++r) {
      block.prefetch(r, ahead);
      const NineTaps terms = terms_of(load_taps(taps + r * kNext, kStride));
      const Lane factor = kTransposed ? broadcast(factors + r) : load(factors);
      float* const to = first + r * stride;
      unroll<kTaps>([&](auto t) {
        float* const term = to + b.terms[t] * kFloats;
        store(term, load(term) + factor * terms.at[t]);
      });
    }
  }
}

// f(out, in, weights from this block to the next): blocks of kIns inputs, the faster, and vectors of outputs.
template <int kIns, class F>
NASDET_INLINE void for_blocks(const FrequencyWeights& w, int64_t begin, int64_t end, const F& f) {
  const int64_t in_blocks = (w.ins + kIns - 1) / kIns;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t in = i % in_blocks * kIns;
    const bool next_row = in + kIns >= w.ins && i + 1 < end;
    f(i / in_blocks * kFloats, in, (next_row ? kFloats * w.in_channels - in : kIns) * kTaps);
  }
}

inline void weights(int tile, const FrequencyWeights& w, int64_t begin, int64_t end) {
  const Folded folded(w);
  const float scale = 1.f / float(tile * tile);
  for_blocks<kFloats>(w, begin, end, [&](int64_t out, int64_t in, int64_t ahead) {
    for (int part = 0; part < kFloats; part += kTermRows)
      if (w.transposed) fold_block<true>(w, folded, scale, out + part, in, ahead);
      else fold_block<false>(w, folded, scale, out, in + part, ahead);
  });
}

constexpr int kGradientIns = 16;  // an output's weights of so many inputs are whole cache lines

// The gradients of a block's weights in a branch, and of mix.
NASDET_INLINE void unfold_block(const FrequencyWeights& w, const Folded& folded, float scale, int64_t out, int64_t in,
                                const FrequencyBranch& b, int64_t ahead) {
  const BranchBlock<kFloats, kGradientIns> block(w, b, w.first_out + out, w.first_in + in);
  if (block.empty()) return;
  alignas(64) float taps[kGradientIns * kTaps * kFloats];  // [input][tap][output]
  for (int64_t r = 0; r < kGradientIns; ++r) {
    NineTaps terms{};
    if (in + r < folded.depth)
      unroll<kTaps>(
          [&](auto t) { terms.at[t] = scale * load(folded.at(in + r, out / kFloats) + b.terms[t] * kFloats); });
    const NineTaps all = taps_of(terms);
    unroll<kTaps>([&](auto t) { store(taps + (r * kTaps + t) * kFloats, all.at[t]); });
  }
  Lane sums[kFloats] = {};
  const bool lines = block.taps == block.kRow &&
                     (reinterpret_cast<uintptr_t>(b.weight_grad + block.offset) | uintptr_t(block.row * 4)) % 64 == 0;
  constexpr int kParts = 64 / kBytes;  // of a cache line, which are stored one after the other
  for (int line = 0; line < kTaps * kGradientIns / (kParts * kFloats); ++line) {
    Lane rows[kParts][kFloats];
    unroll<kParts>([&](auto part) {
      const float* const from = taps + (line * kParts + part) * kFloats * kFloats;
      unroll<kFloats>([&](auto e) { rows[part][e] = load(from + e * kFloats); });
      transpose(rows[part]);
    });
    for (int o = block.first; o < block.last; ++o)
      unroll<kParts>([&](auto part) {
        const int chunk = line * kParts + part;
        const int64_t left = block.taps - chunk * kFloats, count = left < kFloats ? left > 0 ? left : 0 : kFloats;
        const int64_t at = block.offset + chunk * kFloats + o * block.row;
        const Lane row = rows[part][o];
        if (b.mix_grad_part) sums[o] += row * load_up_to(b.weight + at, count);
        if (b.mix_grad_part) __builtin_prefetch(b.weight + at + ahead, 0, 2);
        const Lane gradient = b.mix ? row * b.mix[w.first_out + out + o - b.first] : row;
        if (!b.weight_grad) return;
        if (lines) store_streaming(b.weight_grad + at, gradient);
        else store_up_to(b.weight_grad + at, gradient, count);
      });
  }
  for (int o = block.first; o < block.last && b.mix_grad_part; ++o)
    b.mix_grad_part[(w.first_in + in) / kGradientIns * (b.last - b.first) + w.first_out + out + o - b.first] =
        horizontal_sum<float>(sums[o]);
}

inline void weight_gradients(int tile, const FrequencyWeights& w) {
  const Folded folded(w);
  const float scale = 2.f / float(tile * tile);
  const int64_t blocks = (w.outs + kFloats - 1) / kFloats * ((w.ins + kGradientIns - 1) / kGradientIns);
  for_blocks<kGradientIns>(w, 0, blocks, [&](int64_t out, int64_t in, int64_t ahead) {
    for (int64_t n = 0; n < w.branch_count; ++n) unfold_block(w, folded, scale, out, in, w.branches[n], ahead);
  });
  streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
