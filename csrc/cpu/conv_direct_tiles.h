// Target pixels as sums over taps and source channels: a tile of pixels by a panel of channels stays in registers.
#pragma once
#include "conv_direct_narrow.h"
#include "conv_direct_weights.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kDensePixels = 6;
constexpr int kPanelVectors = kBytes == 64 ? 4 : 2;
constexpr int64_t kChainTerms = 512;  // a sum's chain is broken after so many terms: its rounding grows with it
constexpr int64_t kBlockRows =
    512;                       // of weights that all pixels use in turn: with kTaskChannels a quarter of an L2 cache
constexpr int kMostTaps = 64;  // of a chain
constexpr int64_t kGatherFloats = 12 << 10, kSumFloats = 14 << 10;  // on the stack, where the storage has 16 bits

template <class T, int kVectors>
NASDET_INLINE void tile_finish(vec<T> (&sum)[kDensePixels][kVectors], T* const* to, int64_t last, bool accumulate) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 6
  for (int i = 0; i < kDensePixels; ++i) {
    T* const p = to[i];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors - 1; ++v) store(p + v * W, accumulate ? sum[i][v] + load(p + v * W) : sum[i][v]);
    constexpr int v = kVectors - 1;
    if (last == W) store(p + v * W, accumulate ? sum[i][v] + load(p + v * W) : sum[i][v]);
    else store_part(p + v * W, accumulate ? sum[i][v] + load_part(p + v * W, last) : sum[i][v], last);
  }
}

// to[pixel][channel] = (or +=) the sum over taps and source channels; `last` lanes of the last vector.
template <class T, int kVectors>
__attribute__((noinline)) void dense_tile(const TileTap<T>* taps, int64_t count, int64_t source, const T* weights,
                                          T* const* to, int64_t last, bool accumulate) {
  constexpr int W = kLanes<T>;
  vec<T> sum[kDensePixels][kVectors] = {};
  for (int64_t t = 0; t < count; ++t) {
    const T* pixel[kDensePixels];
#pragma GCC unroll 6
    for (int i = 0; i < kDensePixels; ++i) pixel[i] = taps[t].pixel[i] + (taps[t].offset + source);
    const T* w = weights + taps[t].row * (kVectors * W);
    const int64_t channels = taps[t].count;
#pragma GCC unroll 2
    for (int64_t k = 0; k < channels; ++k, w += kVectors * W) {
      vec<T> row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = load(w + v * W);
#pragma GCC unroll 6
      for (int i = 0; i < kDensePixels; ++i) {
        const vec<T> x = spread<vec<T>>(pixel[i][k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] += x * row[v];
      }
    }
  }
  tile_finish<T, kVectors>(sum, to, last, accumulate);
}

#if defined(__AVX512BF16__)
// dense_tile on products of pairs of bfloat16 channels, summed in float32.
template <int kVectors>
__attribute__((noinline)) void pairs_tile(const TileTap<BFloat16>* taps, int64_t count, int64_t source,
                                          const uint32_t* weights, float* const* to, bool accumulate) {
  constexpr int W = kLanes<float>;
  vec<float> sum[kDensePixels][kVectors] = {};
  for (int64_t t = 0; t < count; ++t) {
    const BFloat16* pixel[kDensePixels];
#pragma GCC unroll 6
    for (int i = 0; i < kDensePixels; ++i) pixel[i] = taps[t].pixel[i] + (taps[t].offset + source);
    const uint32_t* w = weights + taps[t].row / 2 * (kVectors * W);
    const int64_t channels = taps[t].count;
#pragma GCC unroll 2
    for (int64_t k = 0; k < channels; k += 2, w += kVectors * W) {
      __m512bh row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(w + v * W);
#pragma GCC unroll 6
      for (int i = 0; i < kDensePixels; ++i) {
        int32_t two;
        __builtin_memcpy(&two, pixel[i] + k, sizeof two);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] = (vec<float>)_mm512_dpbf16_ps((__m512)sum[i][v], x, row[v]);
      }
    }
  }
  tile_finish<float, kVectors>(sum, to, W, accumulate);
}
#endif

// Lanes are channels of their own.
template <class S>
void depthwise_tile(const TileTap<S>* taps, int64_t count, int64_t source, const arithmetic_t<S>* weights,
                    arithmetic_t<S>* const* to, int64_t width, bool accumulate) {
  using T = arithmetic_t<S>;
  constexpr int W = kLanes<T>;
  const int64_t padded = rounded_up(width, W);
  for (int64_t lane = 0; lane < width; lane += W) {
    const int64_t lanes = at_most(W, width - lane);
    vec<T> sum[kDensePixels] = {};
    for (int64_t t = 0; t < count; ++t) {
      const vec<T> w = load(weights + taps[t].row * padded + lane);
      for (int i = 0; i < kDensePixels; ++i)
        sum[i] += w * load_up_to(taps[t].pixel[i] + (taps[t].offset + source + lane), lanes);
    }
    for (int i = 0; i < kDensePixels; ++i) {
      T* const p = to[i] + lane;
      if (lanes < W) store_part(p, accumulate ? sum[i] + load_part(p, lanes) : sum[i], lanes);
      else store(p, accumulate ? sum[i] + load(p) : sum[i]);
    }
  }
}

template <class T>
void dense_panel(const TileTap<T>* taps, int64_t count, const ConvPanel& panel, T* const* to, int64_t width,
                 bool accumulate) {
  constexpr int W = kLanes<T>;
  const T* const weights = static_cast<const T*>(panel.weights);
  const int64_t vectors = (width + W - 1) / W, last = width - (vectors - 1) * W;
  switch (vectors) {
    case 1:
      return dense_tile<T, 1>(taps, count, panel.source, weights, to, last, accumulate);
    case 2:
      return dense_tile<T, 2>(taps, count, panel.source, weights, to, last, accumulate);
    case 3:
      if constexpr (kPanelVectors > 2)
        return dense_tile<T, 3>(taps, count, panel.source, weights, to, last, accumulate);
      else return;
    case 4:
      if constexpr (kPanelVectors > 2)
        return dense_tile<T, 4>(taps, count, panel.source, weights, to, last, accumulate);
      else return;
  }
}

inline void pairs_panel([[maybe_unused]] const TileTap<BFloat16>* taps, [[maybe_unused]] int64_t count,
                        [[maybe_unused]] const ConvPanel& panel, [[maybe_unused]] float* const* to,
                        [[maybe_unused]] bool accumulate) {
#if defined(__AVX512BF16__)
  const uint32_t* const weights = static_cast<const uint32_t*>(panel.weights);
  switch ((panel.width + kLanes<float> - 1) / kLanes<float>) {
    case 1:
      return pairs_tile<1>(taps, count, panel.source, weights, to, accumulate);
    case 2:
      return pairs_tile<2>(taps, count, panel.source, weights, to, accumulate);
    case 3:
      return pairs_tile<3>(taps, count, panel.source, weights, to, accumulate);
    case 4:
      return pairs_tile<4>(taps, count, panel.source, weights, to, accumulate);
  }
#endif
}

// The taps' pixels in the arithmetic's type: source channels [from, from + range) of each span's.
template <class S>
void gather(TileTap<S>* taps, TileTap<arithmetic_t<S>>* wide, int64_t count, int pixels, int64_t from, int64_t range,
            arithmetic_t<S>* buffer) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t channels = range + taps[t].count;
    for (int i = 0; i < pixels; ++i, buffer += channels) {
      widen(taps[t].pixel[i] + (taps[t].offset + from), buffer, channels);
      wide[t].pixel[i] = buffer;
    }
    wide[t].offset = -from, wide[t].count = taps[t].count, wide[t].row = taps[t].row;
  }
}

// One task: pixels [first, last) of the lattice and panels [first_panel, last_panel).
template <class S> class ConvBand {
  using T = arithmetic_t<S>;
  static constexpr bool kNarrowed = sizeof(S) == 2;  // sums are kept aside, and rounded once
  static constexpr bool kPaired = kHasPairs && __is_same(S, BFloat16);

 public:
  ConvBand(const ConvTiles& job, int64_t first_panel, int64_t last_panel)
      : job_(job),
        panels_(job.panels + first_panel),
        panel_count_(last_panel - first_panel),
        tile_(is_narrow(job.form) ? kNarrowPixels : kDensePixels) {
    for (int64_t p = 0; p < panel_count_; ++p) width_ += padded_width<T>(job.form, panels_[p].width);
    same_ = job.spans[0].count, from_ = panels_[0].source, range_ = panels_[panel_count_ - 1].source - from_;
    int64_t terms = 0;
    for (int64_t s = 0; s < job.span_count; ++s)
      terms += job.spans[s].count, same_ = job.spans[s].count == job.spans[0].count ? same_ : 0;
    at_once_ =
        job.form == ConvForm::narrow_pairs && job.span_count <= kMostTaps && terms <= at_most(kChainTerms, kBlockRows);
  }

  void run(int64_t first, int64_t last) {
    int64_t step = last - first;
    if (kNarrowed && !at_once_) step = kSumFloats / width_ / tile_ * tile_;
    for (; first < last; first += step) pixels(first, at_most(last, first + step));
  }

 private:
  void pixels(int64_t first, int64_t last) {
    for (int64_t begin = 0, end; begin < job_.span_count; begin = end) {  // blocks of weights
      const int64_t row = job_.spans[begin].row;
      for (end = begin + 1; end < job_.span_count && job_.spans[end].row + job_.spans[end].count - row <= kBlockRows;)
        ++end;
      for (int64_t pixel = first; pixel < last; pixel += tile_)
        tile(first, pixel, at_most(tile_, last - pixel), begin, end);
    }
    if (kNarrowed && !at_once_) round(first, last);
  }

  void tile(int64_t first, int64_t pixel, int64_t count, int64_t begin, int64_t end) {
    pixels_.find(job_.source, job_.target, job_.lattice, pixel, count);
    if (!kNarrowed || at_once_)
      for (int i = 0; i < kMostPixels; ++i)
        target_[i] = static_cast<S*>(const_cast<void*>(job_.target.data)) + pixels_.target[i] * job_.target.channels;
    bool accumulate = begin > 0;
    TileTap<S> taps[kMostTaps];
    for (int64_t span = begin; span < end;) {
      int64_t found = 0, terms = 0, floats = 0;
      for (; span < end && found < kMostTaps; ++span) {
        const ConvSpan& s = job_.spans[span];
        const int64_t more = kNarrowed && !as_stored() ? tile_ * (range_ + s.count) : 0;
        if (found && (terms + s.count > kChainTerms || floats + more > kGatherFloats)) break;
        if (!pixels_.under(job_.source, static_cast<const S*>(job_.zeros), s.down, s.across, taps[found].pixel))
          continue;
        taps[found].offset = s.channel, taps[found].count = s.count, taps[found].row = s.row;
        terms += s.count, floats += more, ++found;
      }
      chain(taps, found, pixel - first, accumulate);
      accumulate = true;
    }
  }

  void chain(TileTap<S>* taps, int64_t found, int64_t at, bool accumulate) {
    if constexpr (kNarrowed) {
      if (at_once_) return multiply_at_once(taps, found);
      if (as_stored()) return multiply(taps, found, at, accumulate);
      TileTap<T> wide[kMostTaps];
      gather(taps, wide, found, tile_, from_, range_, gathered_);
      multiply(wide, found, at, accumulate);
    } else {
      multiply(taps, found, at, accumulate);
    }
  }

  // Where a panel's sums go that need no place aside.
  void outputs(const ConvPanel& panel, S** to) {
    for (int i = 0; i < kMostPixels; ++i) to[i] = target_[i] + panel.target;
    for (int64_t i = pixels_.count; i < tile_; ++i) to[i] = reinterpret_cast<S*>(nowhere_);
  }

  void multiply_at_once(const TileTap<S>* taps, int64_t found) {
    if constexpr (kPaired)
      for (int64_t p = 0; p < panel_count_; ++p) {
        S* to[kMostPixels];
        outputs(panels_[p], to);
        narrow_panel(taps, found, same_, panels_[p], to, panels_[p].width, false);
      }
  }

  template <class A> void multiply(const TileTap<A>* taps, int64_t found, int64_t at, bool accumulate) {
    int64_t column = 0;
    for (int64_t p = 0; p < panel_count_; ++p) {
      const ConvPanel& panel = panels_[p];
      const int64_t padded = padded_width<T>(job_.form, panel.width), width = kNarrowed ? padded : panel.width;
      T* to[kMostPixels];
      if constexpr (kNarrowed) {
        for (int i = 0; i < tile_; ++i) to[i] = sums_ + (at + i) * width_ + column;
      } else {
        outputs(panel, to);
      }
      column += padded;
      if (as_stored()) multiply_stored(taps, found, panel, to, accumulate);
      else if constexpr (sizeof(A) == sizeof(T)) {
        if (job_.form == ConvForm::dense) dense_panel<T>(taps, found, panel, to, width, accumulate);
        else if constexpr (sizeof(T) == 4) narrow_panel(taps, found, same_, panel, to, width, accumulate);
      }
    }
  }

  bool as_stored() const {
    return job_.form == ConvForm::depthwise || has_pairs(job_.form);
  }  // pixels need not be widened

  template <class A>
  void multiply_stored(const TileTap<A>* taps, int64_t found, const ConvPanel& panel, T* const* to, bool accumulate) {
    if constexpr (sizeof(A) == sizeof(S)) {
      if (job_.form == ConvForm::depthwise)
        return depthwise_tile<S>(reinterpret_cast<const TileTap<S>*>(taps), found, panel.source,
                                 static_cast<const T*>(panel.weights), to, panel.width, accumulate);
    }
    if constexpr (kPaired && sizeof(A) == 2) {
      if (job_.form == ConvForm::narrow_pairs)
        narrow_panel(taps, found, same_, panel, to, padded_width<T>(job_.form, panel.width), accumulate);
      else pairs_panel(taps, found, panel, to, accumulate);
    }
  }

  void round(int64_t first, int64_t last) {
    for (int64_t pixel = first; pixel < last; pixel += kMostPixels) {
      pixels_.find(job_.source, job_.target, job_.lattice, pixel, at_most(kMostPixels, last - pixel));
      for (int64_t i = 0; i < pixels_.count; ++i) {
        const T* sum = sums_ + (pixel - first + i) * width_;
        S* const to = static_cast<S*>(const_cast<void*>(job_.target.data)) + pixels_.target[i] * job_.target.channels;
        for (int64_t p = 0; p < panel_count_; ++p) {
          const int64_t width = panels_[p].width;
          for (int64_t lane = 0; lane < width; lane += kLanes<T>) {
            if (width - lane >= kLanes<T>) store(to + panels_[p].target + lane, load(sum + lane));
            else store_part(to + panels_[p].target + lane, load_part(sum + lane, width - lane), width - lane);
          }
          sum += padded_width<T>(job_.form, width);
        }
      }
    }
  }

  const ConvTiles& job_;
  const ConvPanel* panels_;
  const int64_t panel_count_;
  const int tile_;
  int64_t width_ = 0, from_, range_;
  ConvPixels<S, kMostPixels> pixels_;
  int64_t same_;  // source channels of every span, or 0
  bool at_once_;  // whether a sum is one chain, and can be rounded straight from registers
  S* target_[kMostPixels];
  alignas(64) T nowhere_[kMostPixels * 8];  // for the pixels that a last tile lacks
  alignas(64) T sums_[kNarrowed ? kSumFloats : 1];
  alignas(64) T gathered_[kNarrowed ? kGatherFloats + kMostPixels * (kTaskSources + kSpanChannels) : 1];
};

}  // namespace
}  // namespace nasdet::NASDET_ISA
