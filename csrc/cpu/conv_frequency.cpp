// The multi-dilation convolutions in the frequency domain, in float32: overlapping tiles, real transforms, and three real
// matrix products per complex frequency. The work of the products no longer depends on the number of dilations.
#include "frequency.h"

// Nothing here gains from bfloat16 instructions: the AVX-512 kernels serve there too. Below AVX2 it does not run.
#if defined(__AVX2__) && !defined(__AVX512BF16__)
#include "frequency_multiply.h"

namespace nasdet::NASDET_ISA {
namespace {

template <class F> NASDET_INLINE void for_tile(int tile, const F& f) {
  switch (tile) {
    case 16:
      return f(Constant<16>{});
    case 20:
      return f(Constant<20>{});
    case 24:
      return f(Constant<24>{});
    case 32:
      return f(Constant<32>{});
  }
}
template <class F> NASDET_INLINE void for_tile_and_grid(int tile, int grid, const F& f) {
  for_tile(tile, [&](auto t) {
    if (grid == 7) return f(t, Constant<7>{});
    if (grid == 11) return f(t, Constant<11>{});
    if constexpr (t == 32) return f(t, Constant<29>{});
  });
}

}  // namespace

void frequency_spectra(int tile, const FrequencyTiles& t, const FrequencyPlanes& out, const float* map, int64_t begin,
                       int64_t end) {
  for_tile(tile, [&](auto size) { spectra<size>(t, out, map, begin, end); });
}

void frequency_maps(int tile, const FrequencyTiles& t, const FrequencyPlanes& in, float* map, int64_t begin,
                    int64_t end) {
  for_tile(tile, [&](auto size) { maps<size>(t, in, map, begin, end); });
}

void frequency_weights(int tile, const FrequencyWeights& w, int64_t begin, int64_t end) {
  weights(tile, w, begin, end);
}

void frequency_weight_gradients(int tile, const FrequencyWeights& w) { weight_gradients(tile, w); }

void frequency_weight_planes(int tile, int grid, const FrequencyWeights& w, const FrequencyStep& s) {
  for_tile_and_grid(tile, grid, [&](auto size, auto taps) { weight_planes<size, taps>(w, s); });
}

void frequency_weight_planes_back(int tile, int grid, const FrequencyWeights& w, const FrequencyStep& s) {
  for_tile_and_grid(tile, grid, [&](auto size, auto taps) { weight_planes_back<size, taps>(w, s); });
}

void frequency_multiply(const FrequencyProduct& p) { multiply(p); }

void frequency_multiply_gradients(const FrequencyGradientProduct& p) { multiply_gradients(p); }

}  // namespace nasdet::NASDET_ISA
#endif

#ifdef NASDET_REGISTER
#include "frequency_launch.h"

namespace nasdet {
const ConvAlgorithm kFrequencyConv = {"frequency", frequency_why_not, frequency_seconds, frequency_forward,
                                      frequency_backward};
}
#endif
