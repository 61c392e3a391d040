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

// Where the vectors of a step's weights go, row by row of the depth: panel by panel.
struct PanelPlace {
  const FrequencyStep& s;
  int64_t vectors, row = 0, vector = 0;

  NASDET_INLINE float* planes() const {
    constexpr int64_t kPanelVectors = kPanel / kFloats;
    const int64_t panel = vector / kPanelVectors * kPanelVectors, rest = vectors - panel;
    const int64_t wide = rest < kPanelVectors ? rest : kPanelVectors;
    return s.planes + (panel * s.depth + row * wide + vector - panel) * kFloats;
  }
  NASDET_INLINE void next() {
    if (++vector == vectors) vector = 0, ++row;
  }
};

// [0, count), several at a time: f(first, how many).
template <int kMost, class F> NASDET_INLINE void for_groups(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += kMost) f(i, int(count - i < kMost ? count - i : kMost));
}

template <int T, int kGrid, bool kGradient>
NASDET_APART void step_planes(const FrequencyWeights& w, const FrequencyStep& s) {
  using Taps = TapTransform<T, kGrid / 2>;
  using Column = typename Taps::Column;
  const Folded folded(w);
  const float* const terms = folded.at(s.first, 0);
  const auto put_column = [&](int column, const auto& put) {
    const typename Taps::Factors factors(w.fold, column);
    PanelPlace to{s, folded.vectors};
    for_groups<Taps::kTogether>(s.depth * folded.vectors, [&](int64_t i, int count) {
      Column columns[Taps::kTogether];
      Taps::columns_of(w.fold, factors, terms + i * folded.terms, folded.terms, count, columns);
      for (int n = 0; n < count; ++n, to.next()) put(columns[n], to.planes());
    });
  };
  if (s.step < T / 2 - 1)
    return put_column(s.step + 1, [&](const Column& column, float* planes) {
      Taps::template complex_planes<kGradient>(column, planes);
    });
  for (int last = 0; last < 2; ++last)
    put_column(last * T / 2, [&](const Column& column, float* planes) {
      Taps::template real_planes<kGradient>(column, last, planes);
    });
}

template <int T, int kGrid> void weight_planes(const FrequencyWeights& w, const FrequencyStep& s) {
  if (w.transposed) step_planes<T, kGrid, true>(w, s);
  else step_planes<T, kGrid, false>(w, s);
}

// Of planes in which a row's vectors lie side by side.
template <int T, int kGrid, bool kAdd>
NASDET_APART void step_planes_back(const FrequencyWeights& w, const FrequencyStep& s) {
  using Taps = TapTransform<T, kGrid / 2>;
  using Column = typename Taps::Column;
  const Folded folded(w);
  float* const terms = folded.at(s.first, 0);
  const auto take_column = [&](auto add, int column, const auto& get) {
    const typename Taps::Factors factors(w.fold, column);
    for_groups<Taps::kTogether>(s.depth * folded.vectors, [&](int64_t i, int count) {
      Column columns[Taps::kTogether];
      for (int n = 0; n < count; ++n) get(s.planes + (i + n) * kFloats, columns[n]);
      Taps::template columns_back<add>(w.fold, factors, columns, count, terms + i * folded.terms, folded.terms);
    });
  };
  if (s.step < T / 2 - 1)
    return take_column(Constant<kAdd>{}, s.step + 1,
                       [&](const float* planes, Column& column) { Taps::complex_planes_back(planes, column); });
  const auto take_last = [&](auto add, int last) {
    take_column(add, last * T / 2,
                [&](const float* planes, Column& column) { Taps::real_planes_back(planes, last, column); });
  };
  take_last(Constant<kAdd>{}, 0);
  take_last(Constant<1>{}, 1);
}
template <int T, int kGrid> void weight_planes_back(const FrequencyWeights& w, const FrequencyStep& s) {
  if (s.add) step_planes_back<T, kGrid, true>(w, s);
  else step_planes_back<T, kGrid, false>(w, s);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
