// Spectra of the weights, straight from the branches' taps, and back. A block of lanes x lanes channels is laid out as
// grids of taps [row][tap y][tap x][lane]; taps of several branches at one place add up.
#pragma once
#include "frequency_symmetric.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kTaps = 9;
#if defined(__AVX512F__)
constexpr int kPanel = 64;
#else
constexpr int kPanel = 16;  // columns of one matrix product
#endif

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

// The grids of one block of channels.
template <int kGrid> struct Block {
  // places, and elements, of one grid
  static constexpr int kArea = kGrid * kGrid;
  static constexpr int kRow = kArea * kFloats;
  static constexpr int kCentre = kArea / 2;

  const FrequencyWeights& w;
  float scale;
  int places[kArea], place_count;  // where any branch has a tap

  Block(const FrequencyWeights& weights, int tile) : w(weights), scale(1.f / float(tile * tile)), place_count(0) {
    bool used[kArea] = {};
    for (int64_t b = 0; b < w.branch_count; ++b)
      for (int k = 0; k < kTaps; ++k) used[place(w.branches[b], k)] = true;
    for (int i = 0; i < kArea; ++i)
      if (used[i]) places[place_count++] = i;
  }

  int place(const FrequencyBranch& b, int tap) const {
    return kCentre + (tap / 3 - 1) * b.dilation_h * kGrid + (tap % 3 - 1) * b.dilation_w;
  }

  void clear(float* grids) const {
    for (int row = 0; row < kFloats; ++row)
      for (int i = 0; i < place_count; ++i) store(grids + row * kRow + places[i] * kFloats, Lane{});
  }

  // What a branch has in the block: rows [first, last) of outputs, and `taps` consecutive taps of `ins` inputs in each.
  struct Part {
    int first, last;
    int64_t taps, offset;     // of the block's corner from the branch's first weight, which need not be in the branch
    int at[kFloats * kTaps];  // places of the taps in grids of rows over inputs
  };
  bool part_of(const FrequencyBranch& b, int64_t out, int64_t in, Part& p) const {
    const int64_t first = b.first - out, last = b.last - out;
    p.first = first > 0 ? int(first < kFloats ? first : kFloats) : 0;
    p.last = last < kFloats ? int(last > 0 ? last : 0) : kFloats;
    if (p.first >= p.last) return false;
    const int64_t ins = w.in_channels - in < kFloats ? w.in_channels - in : kFloats;
    p.taps = ins * kTaps, p.offset = ((out - b.first) * w.in_channels + in) * kTaps;
    for (int k = 0; k < kTaps; ++k)
      for (int c = 0, to = place(b, k) * kFloats; c < kFloats; ++c) p.at[c * kTaps + k] = c * kRow + to;
    return true;
  }
  int64_t stride() const { return w.in_channels * kTaps; }
  // From the corner of a block in the chunk to that of the next.
  int64_t to_next(int64_t in, bool more) const {
    return in + kFloats >= w.ins && more ? kFloats * stride() - in * kTaps : kFloats * kTaps;
  }
  static int64_t at_chunk(const Part& p, int chunk) {  // elements of a chunk that are in the branch
    const int64_t left = p.taps - chunk * kFloats;
    return left < kFloats ? left > 0 ? left : 0 : kFloats;
  }

  // grids[in][place][out] = the mixture's taps. The block that comes next lies `ahead` weights further.
  void gather(float* grids, int64_t out, int64_t in, int64_t ahead) const {
    clear(grids);
    Part p;
    for (int64_t n = 0; n < w.branch_count; ++n) {
      const FrequencyBranch& b = w.branches[n];
      if (!part_of(b, out, in, p)) continue;
      Lane factor = splat(scale);
      if (b.mix) {
        float lanes[kFloats] = {};
        for (int o = p.first; o < p.last; ++o) lanes[o] = b.mix[out + o - b.first];
        factor *= load(lanes);
      }
      const bool whole = p.first == 0 && p.last == kFloats && p.taps == kFloats * kTaps;
      for (int chunk = 0; chunk < kTaps; ++chunk) {
        Lane rows[kFloats];
        const float* const from = b.weight + p.offset + chunk * kFloats;
        const int64_t count = at_chunk(p, chunk);
        if (whole)
          unroll<kFloats>([&](auto o) {
            rows[o] = load(from + o * stride());
            __builtin_prefetch(from + o * stride() + ahead, 0, 2);
          });
        else
          for (int o = 0; o < kFloats; ++o)
            rows[o] = o >= p.first && o < p.last ? load_up_to(from + o * stride(), count) : Lane{};
        transpose(rows);
        const int* const at = p.at + chunk * kFloats;
        unroll<kFloats>([&](auto e) { store(grids + at[e], load(grids + at[e]) + rows[e] * factor); });
      }
    }
  }

  // The reverse: gradients of the taps times mix to the weights; their products with the weights, summed, to mix.
  void scatter(const float* grids, int64_t out, int64_t in, int64_t ahead) const {
    Part p;
    for (int64_t n = 0; n < w.branch_count; ++n) {
      const FrequencyBranch& b = w.branches[n];
      if (!part_of(b, out, in, p)) continue;
      Lane sums[kFloats] = {};
      const bool lines =
          p.taps == kFloats * kTaps &&
          (reinterpret_cast<uintptr_t>(b.weight_grad + p.offset) | uintptr_t(stride() * 4)) % kBytes == 0;
      for (int chunk = 0; chunk < kTaps; ++chunk) {
        Lane rows[kFloats];
        const int* const at = p.at + chunk * kFloats;
        unroll<kFloats>([&](auto e) { rows[e] = 2 * scale * load(grids + at[e]); });
        transpose(rows);
        const int64_t from = p.offset + chunk * kFloats, count = at_chunk(p, chunk);
        for (int o = p.first; o < p.last; ++o) {
          const int64_t at_row = from + o * stride();
          if (b.mix_grad_part) {
            sums[o] += rows[o] * load_up_to(b.weight + at_row, count);
            __builtin_prefetch(b.weight + at_row + ahead, 0, 2);
          }
          const Lane gradient = b.mix ? rows[o] * b.mix[out + o - b.first] : rows[o];
          if (!b.weight_grad) continue;
          if (lines) store_plane(b.weight_grad + at_row, gradient, true);
          else store_up_to(b.weight_grad + at_row, gradient, count);
        }
      }
      for (int o = p.first; o < p.last && b.mix_grad_part; ++o)
        b.mix_grad_part[in / kFloats * (b.last - b.first) + out + o - b.first] = horizontal_sum<float>(sums[o]);
    }
  }

  // to[row][place][lane] = from[lane][place][row].
  void turn(const float* from, float* to) const {
    for (int i = 0; i < place_count; ++i) {
      Lane rows[kFloats];
      const int at = places[i] * kFloats;
      unroll<kFloats>([&](auto r) { rows[r] = load(from + r * kRow + at); });
      transpose(rows);
      unroll<kFloats>([&](auto r) { store(to + r * kRow + at, rows[r]); });
    }
  }
};

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

template <int T, int kGrid> void weights(const FrequencyWeights& w, int64_t begin, int64_t end) {
  using Taps = TapTransform<T, kGrid / 2>;
  const Block<kGrid> block(w, T);
  const Folded folded(w);
  const int64_t in_blocks = (w.ins + kFloats - 1) / kFloats;
  float *const grids = w.grids, *const turned = w.grids + kFloats * Block<kGrid>::kRow;
  for (int64_t i = 0; i < 2 * kFloats * Block<kGrid>::kRow; i += kFloats) store(grids + i, Lane{});
  for (int64_t i = begin; i < end; ++i) {
    const int64_t out = i / in_blocks * kFloats, in = i % in_blocks * kFloats;
    block.gather(grids, w.first_out + out, w.first_in + in, block.to_next(in, i + 1 < end));
    if (w.transposed) block.turn(grids, turned);
    const int64_t first = w.transposed ? out : in, vector = (w.transposed ? in : out) / kFloats;
    for (int64_t r = 0; r < kFloats && first + r < folded.depth; ++r)
      Taps::fold_grid(w.fold, (w.transposed ? turned : grids) + r * Block<kGrid>::kRow, folded.at(first + r, vector));
  }
}

// Row by row of the depth, and along it panel by panel.
template <class F> NASDET_INLINE void for_vectors(const FrequencyStep& s, int64_t vectors, const F& f) {
  constexpr int64_t kPanelVectors = kPanel / kFloats;
  for (int64_t row = 0; row < s.depth; ++row)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t panel = v / kPanelVectors * kPanelVectors;
      const int64_t rest = vectors - panel;
      const int64_t wide = rest < kPanelVectors ? rest : kPanelVectors;
      f(s.first + row, v, s.planes + (panel * s.depth + row * wide + v - panel) * kFloats);
    }
}

template <int T, int kGrid, bool kGradient>
NASDET_APART void step_planes(const FrequencyWeights& w, const FrequencyStep& s) {
  using Taps = TapTransform<T, kGrid / 2>;
  const Folded folded(w);
  if (s.step < T / 2 - 1) {
    const typename Taps::Factors factors(w.fold, s.step + 1);
    for_vectors(s, folded.vectors, [&](int64_t row, int64_t vector, float* planes) {
      Taps::template complex_planes<kGradient>(Taps::column_of(w.fold, factors, folded.at(row, vector)), planes,
                                               s.plane);
    });
  } else {
    const typename Taps::Factors factors[2] = {{w.fold, 0}, {w.fold, T / 2}};
    for_vectors(s, folded.vectors, [&](int64_t row, int64_t vector, float* planes) {
      for (int last = 0; last < 2; ++last)
        Taps::template real_planes<kGradient>(Taps::column_of(w.fold, factors[last], folded.at(row, vector)), last,
                                              planes, s.plane);
    });
  }
}

template <int T, int kGrid> void weight_planes(const FrequencyWeights& w, const FrequencyStep& s) {
  if (w.transposed) step_planes<T, kGrid, true>(w, s);
  else step_planes<T, kGrid, false>(w, s);
}

// Of planes in which a row's vectors lie side by side.
template <int T, int kGrid, bool kAdd>
NASDET_APART void step_planes_back(const FrequencyWeights& w, const FrequencyStep& s) {
  using Taps = TapTransform<T, kGrid / 2>;
  const Folded folded(w);
  float* const terms = folded.at(s.first, 0);
  if (s.step < T / 2 - 1) {
    const typename Taps::Factors factors(w.fold, s.step + 1);
    for (int64_t i = 0; i < s.depth * folded.vectors; ++i)
      Taps::template column_back<kAdd>(w.fold, factors, Taps::complex_planes_back(s.planes + i * kFloats, s.plane),
                                       terms + i * folded.terms);
  } else {
    const typename Taps::Factors factors[2] = {{w.fold, 0}, {w.fold, T / 2}};
    for (int64_t i = 0; i < s.depth * folded.vectors; ++i) {
      Taps::template column_back<kAdd>(w.fold, factors[0], Taps::real_planes_back(s.planes + i * kFloats, 0, s.plane),
                                       terms + i * folded.terms);
      Taps::template column_back<true>(w.fold, factors[1], Taps::real_planes_back(s.planes + i * kFloats, 1, s.plane),
                                       terms + i * folded.terms);
    }
  }
}
template <int T, int kGrid> void weight_planes_back(const FrequencyWeights& w, const FrequencyStep& s) {
  if (s.add) step_planes_back<T, kGrid, true>(w, s);
  else step_planes_back<T, kGrid, false>(w, s);
}

template <int T, int kGrid> void weight_gradients(const FrequencyWeights& w, int64_t begin, int64_t end) {
  using Taps = TapTransform<T, kGrid / 2>;
  const Block<kGrid> block(w, T);
  const Folded folded(w);
  const int64_t in_blocks = (w.ins + kFloats - 1) / kFloats;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t out = i / in_blocks * kFloats, in = i % in_blocks * kFloats;
    if (in + kFloats > w.ins) block.clear(w.grids);
    for (int64_t r = 0; r < kFloats && in + r < w.ins; ++r)
      Taps::unfold_grid(w.fold, folded.at(in + r, out / kFloats), w.grids + r * Block<kGrid>::kRow);
    block.scatter(w.grids, w.first_out + out, w.first_in + in, block.to_next(in, i + 1 < end));
  }
  streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
