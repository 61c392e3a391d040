// Spectra of the folded weights, column by column, and back.
#pragma once
#include "frequency_branches.h"
#include "frequency_symmetric.h"

namespace nasdet::NASDET_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kPanel = 64;
#else
constexpr int kPanel = 16;  // columns of one matrix product
#endif

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

}  // namespace
}  // namespace nasdet::NASDET_ISA
