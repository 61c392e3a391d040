// The gradient of the weights: for every tap, input pixels by output gradients, summed over pixels in registers.
#pragma once
#include "conv_direct_tiles.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kGradRows = 6, kGradNarrowRows = 8;   // input channels of a tile
constexpr int64_t kGradPixels = 96;                 // of a chain
constexpr int64_t kGradWidth = kTaskChannels + 64;  // of them, lanes beyond the last channel included

// sums[row][lane] += sum over pixels (pairs of them) of input[pixel][row] * grad[pixel][lane], vectors of type V.
template <bool kPairs, class T, class V, int kRows, int kVectors>
__attribute__((noinline)) void grad_tile(const T* const* pixel, int64_t offset, const T* grad, int64_t stride,
                                         int64_t count, T* sums, int64_t width) {
  constexpr int W = int(sizeof(V) / sizeof(T));
  V sum[kRows][kVectors] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < count; ++k, grad += stride) {
    const T* x = pixel[k] + offset;
    V g[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) __builtin_memcpy(&g[v], grad + v * W, sizeof(V));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add_product<kPairs>(sum[r][v], x[r], g[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V before;
      T* const p = sums + r * width + v * W;
      __builtin_memcpy(&before, p, sizeof before);
      before += sum[r][v];
      __builtin_memcpy(p, &before, sizeof before);
    }
}

template <class T> struct GradRow {  // what the tiles of one panel and tap share
  const T* const* pixel;
  int64_t offset;
  const T* grad;
  int64_t stride, count;
  T* sums;
  int64_t width;
};

template <bool kPairs, class T, class V, int kVectors, int kMost>
NASDET_INLINE void grad_rows(const GradRow<T>& a, int64_t row, int64_t rows) {
  const auto run = [&](auto tile) {
    tile(a.pixel, a.offset + row, a.grad, a.stride, a.count, a.sums + row * a.width, a.width);
  };
  switch (rows) {
    case 1:
      return run(grad_tile<kPairs, T, V, 1, kVectors>);
    case 2:
      return run(grad_tile<kPairs, T, V, 2, kVectors>);
    case 3:
      return run(grad_tile<kPairs, T, V, 3, kVectors>);
    case 4:
      return run(grad_tile<kPairs, T, V, 4, kVectors>);
    case 5:
      return run(grad_tile<kPairs, T, V, 5, kVectors>);
    case 6:
      return run(grad_tile<kPairs, T, V, 6, kVectors>);
    case 7:
      if constexpr (kMost > 6) return run(grad_tile<kPairs, T, V, 7, kVectors>);
      else return;
    case 8:
      if constexpr (kMost > 6) return run(grad_tile<kPairs, T, V, 8, kVectors>);
      else return;
  }
}

template <bool kPairs, class T, class V, int kVectors, int kMost> void grad_panel(const GradRow<T>& a, int64_t rows) {
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t now = (rows - row + tiles - tile - 1) / (tiles - tile);
    grad_rows<kPairs, T, V, kVectors, kMost>(a, row, now);
    row += now;
  }
}

template <bool kPairs, class T> void grad_panel(const GradRow<T>& a, int64_t rows, ConvForm form) {
  constexpr int W = kLanes<T>;
  if constexpr (sizeof(T) == 4) {
    if (form == ConvForm::narrow) {
      if (a.width == 4) return grad_panel<kPairs, T, Lanes<4>::type, 1, kGradNarrowRows>(a, rows);
      if constexpr (kBytes >= 32) {
        if (a.width == 8) return grad_panel<kPairs, T, Lanes<8>::type, 1, kGradNarrowRows>(a, rows);
      }
      if constexpr (kBytes >= 64) return grad_panel<kPairs, T, Lanes<16>::type, 1, kGradNarrowRows>(a, rows);
    }
  }
  switch (a.width / W) {
    case 1:
      return grad_panel<kPairs, T, vec<T>, 1, kGradRows>(a, rows);
    case 2:
      return grad_panel<kPairs, T, vec<T>, 2, kGradRows>(a, rows);
    case 3:
      if constexpr (kPanelVectors > 2) return grad_panel<kPairs, T, vec<T>, 3, kGradRows>(a, rows);
      else return;
    case 4:
      if constexpr (kPanelVectors > 2) return grad_panel<kPairs, T, vec<T>, 4, kGradRows>(a, rows);
      else return;
  }
}

// One task: panels of one range of input channels, all pixels.
template <class S> class ConvWeightGradTask {
  using T = arithmetic_t<S>;
  static constexpr bool kNarrowed = sizeof(S) == 2;
  static constexpr bool kPaired = kHasPairs && __is_same(S, BFloat16);  // two pixels' values side by side in 32 bits
  static constexpr int64_t kPixels = kGradPixels * 4 / int64_t(sizeof(T));

 public:
  explicit ConvWeightGradTask(const ConvWeightGrad& job) : job_(job), channels_(job.last - job.first) {
    const ConvPanel& last = job.panels[job.panel_count - 1];
    target_ = job.panels[0].target, targets_ = last.target + last.width - target_;
    source_ = job.panels[0].source + job.first;
    sources_ = last.source + (job.form == ConvForm::depthwise ? last.width : job.last) - source_;
  }

  void run() {
    for (int64_t p = 0; p < job_.panel_count; ++p) {
      T* const sums = static_cast<T*>(job_.panels[p].weights);
      const int64_t count = job_.tap_count * channels_ * padded_width<T>(job_.form, job_.panels[p].width);
      for (int64_t i = 0; i < count; ++i) sums[i] = T(0);
      // Lanes beyond a panel's width are read, and their sums dropped: they must exist.
      const int64_t end = job_.panels[p].target - target_ + padded_width<T>(job_.form, job_.panels[p].width);
      stride_ = stride_ < end ? end : stride_;
    }
    const int64_t pixels = job_.images * job_.target.height * job_.target.width;
    for (int64_t first = 0; first < pixels; first += kPixels) chunk(first, at_most(kPixels, pixels - first));
  }

 private:
  void chunk(int64_t first, int64_t count) {
    const ConvLattice lattice{0, 0, 1, 1, job_.target.height, job_.target.width, job_.stride_h, job_.stride_w};
    pixels_.find(job_.source, job_.target, lattice, first, count);
    const bool paired = kPaired && job_.form != ConvForm::depthwise;
    const S* const grads = static_cast<const S*>(job_.target.data) + first * job_.target.channels + target_;
    for (int64_t i = 0; i < count; i += 1 + paired) {
      T* const to = grads_ + i / (1 + paired) * stride_;
      const S* const one = grads + i * job_.target.channels;
      if (paired)
        pair(one, i + 1 < count ? one + job_.target.channels : static_cast<const S*>(job_.zeros), to, targets_);
      else widen(one, to, targets_);
      for (int64_t lane = targets_; lane < stride_; ++lane) to[lane] = T(0);
    }
    for (int64_t t = 0; t < job_.tap_count; ++t) {
      const S* under[kPixels];
      if (!pixels_.under(job_.source, static_cast<const S*>(job_.zeros), job_.taps[t].down, job_.taps[t].across, under))
        continue;
      if constexpr (kNarrowed) {
        const T* wide[kPixels];
        int64_t rows = 0;
        for (int64_t i = 0; i < count; i += 1 + paired, ++rows) {
          T* const to = gathered_ + rows * sources_;
          if (paired) pair(under[i] + source_, under[i + 1] + source_, to, sources_);
          else widen(under[i] + source_, to, sources_);
          wide[rows] = to;
        }
        panels(t, wide, -source_, rows);
      } else {
        panels(t, under, 0, count);
      }
    }
  }

  // Elements of two pixels side by side, as 32 bits each.
  static void pair(const S* even, const S* odd, T* to, int64_t count) {
    if constexpr (kPaired) {
      constexpr int W = kLanes<float>;
      for (int64_t i = 0; i < count; i += W) {
        const int64_t lanes = at_most(W, count - i);
        const vec_u32 both = ((vec_u32)load_up_to(even + i, lanes) >> 16) | (vec_u32)load_up_to(odd + i, lanes);
        if (lanes == W) store(to + i, (vec<float>)both);
        else store_part(to + i, (vec<float>)both, lanes);
      }
    }
  }

  void panels(int64_t tap, const T* const* pixel, int64_t offset, int64_t count) {
    for (int64_t p = 0; p < job_.panel_count; ++p) {
      const ConvPanel& panel = job_.panels[p];
      const int64_t width = padded_width<T>(job_.form, panel.width);
      const GradRow<T> row{pixel,
                           offset + panel.source + job_.first,
                           grads_ + panel.target - target_,
                           stride_,
                           count,
                           static_cast<T*>(panel.weights) + tap * channels_ * width,
                           width};
      if (job_.form == ConvForm::depthwise) depthwise(row, panel.width);
      else grad_panel<kPaired, T>(row, channels_, job_.form);
    }
  }

  static void depthwise(const GradRow<T>& a, int64_t width) {
    constexpr int W = kLanes<T>;
    for (int64_t lane = 0; lane < width; lane += W) {
      const int64_t lanes = at_most(W, width - lane);
      vec<T> sum[2] = {};
      for (int64_t k = 0; k < a.count; ++k)
        sum[k & 1] += load_up_to(a.pixel[k] + a.offset + lane, lanes) * load(a.grad + k * a.stride + lane);
      store(a.sums + lane, load(a.sums + lane) + (sum[0] + sum[1]));
    }
  }

  const ConvWeightGrad& job_;
  const int64_t channels_;
  int64_t target_, targets_, source_, sources_, stride_ = 0;
  ConvPixels<S, kPixels> pixels_;
  alignas(64) T grads_[kPixels * kGradWidth];
  alignas(64) T gathered_[kNarrowed ? kPixels * (kGradSources + kSpanChannels) : 1];
};

}  // namespace
}  // namespace nasdet::NASDET_ISA
