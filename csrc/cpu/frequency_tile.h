// Two-dimensional transforms of a T x T tile, for as many channels at once as a vector has lanes: rows first, as real
// numbers, then columns. Columns 0 and T / 2 of the half spectrum are real, and so have half of their frequencies.
#pragma once
#include "frequency.h"
#include "frequency_fft.h"

namespace nasdet::NASDET_ISA {
namespace {

#define NASDET_APART __attribute__((noinline, flatten))

// Half a cache line past the caches would be worse than into them.
NASDET_INLINE void store_plane(float* p, Lane v, bool streaming) {
  if (kBytes == 64 && streaming) store_streaming(p, v);
  else store(p, v);
}

template <int T> struct Tile {
  static constexpr int kLast = T / 2;
  static constexpr int64_t kBins = frequency_bins(T);

  struct alignas(64) Half { Lane re[kLast + 1][T], im[kLast + 1][T]; };  // [column of the half spectrum][row]

  // The first complex frequency of a column.
  static constexpr int bin(int column) {
    return column == 0 ? (kLast - 1) * T : column == kLast ? (kLast - 1) * T + kLast - 1 : (column - 1) * T;
  }

  static NASDET_INLINE void keep_row(const Complexes<kLast + 1>& y, Half& half, int row) {
    unroll<kLast + 1>([&](auto k) {
      half.re[k][row] = y.re[k];
      if constexpr (int(decltype(k){}) % kLast != 0) half.im[k][row] = y.im[k];
    });
  }

  template <bool kInside>
  static NASDET_APART void map_row(const float* p, int64_t pixel, int first, int last, int64_t count, Half& half,
                                   int row) {
    Reals<T> x;
    unroll<T>([&](auto j) {
      const float* const at = p + j * pixel;
      __builtin_prefetch(at + kFloats, 0, 2);  // what the next channels' call reads: too far apart for the CPU to guess
      x.at[j] = kInside ? load(at) : j >= first && j < last ? load_up_to(at, count) : Lane{};
    });
    keep_row(real_fft<T>(x), half, row);
  }

  static NASDET_APART void complex_column(const Half& half, int column, float* planes, int64_t plane, bool streaming) {
    Complexes<T> x;
    unroll<T>([&](auto j) { x.re[j] = half.re[column][j], x.im[j] = half.im[column][j]; });
    const Complexes<T> y = fft<T, -1>(x);
    float* const p = planes + 2 * bin(column) * plane;
    unroll<T>([&](auto k) {
      store_plane(p + 2 * k * plane, y.re[k], streaming), store_plane(p + (2 * k + 1) * plane, y.im[k], streaming);
    });
  }
  static NASDET_APART void real_column(const Half& half, int column, float* planes, int64_t plane, bool streaming) {
    Reals<T> x;
    unroll<T>([&](auto j) { x.at[j] = half.re[column][j]; });
    const auto y = real_fft<T>(x);
    float *const p = planes + 2 * bin(column) * plane, *const real = planes + (2 * kBins + (column ? 2 : 0)) * plane;
    unroll<kLast - 1>([&](auto k) {
      store_plane(p + 2 * k * plane, y.re[k + 1], streaming),
          store_plane(p + (2 * k + 1) * plane, y.im[k + 1], streaming);
    });
    store_plane(real, y.re[0], streaming), store_plane(real + plane, y.re[kLast], streaming);
  }
  static void columns(const Half& half, float* planes, int64_t plane, bool streaming) {
    real_column(half, 0, planes, plane, streaming);
    real_column(half, kLast, planes, plane, streaming);
    for (int column = 1; column < kLast; ++column) complex_column(half, column, planes, plane, streaming);
  }

  // The call that comes next but one reads the planes `kAhead` elements further.
  static constexpr int kAhead = 2 * kFloats;
  static NASDET_INLINE Lane load_and_fetch(const float* p) {
    __builtin_prefetch(p + kAhead);
    return load(p);
  }

  static NASDET_APART void complex_column_back(const float* planes, int64_t plane, Half& half, int column) {
    Complexes<T> x;
    const float* const p = planes + 2 * bin(column) * plane;
    unroll<T>([&](auto k) {
      x.re[k] = load_and_fetch(p + 2 * k * plane), x.im[k] = load_and_fetch(p + (2 * k + 1) * plane);
    });
    const Complexes<T> y = fft<T, 1>(x);
    unroll<T>([&](auto j) { half.re[column][j] = y.re[j], half.im[column][j] = y.im[j]; });
  }
  static NASDET_APART void real_column_back(const float* planes, int64_t plane, Half& half, int column) {
    Complexes<kLast + 1> x;
    const float* const p = planes + 2 * bin(column) * plane;
    const float* const real = planes + (2 * kBins + (column ? 2 : 0)) * plane;
    x.re[0] = load_and_fetch(real), x.re[kLast] = load_and_fetch(real + plane);
    unroll<kLast - 1>([&](auto k) {
      x.re[k + 1] = load_and_fetch(p + 2 * k * plane), x.im[k + 1] = load_and_fetch(p + (2 * k + 1) * plane);
    });
    const auto y = real_ifft<T>(x);
    unroll<T>([&](auto j) { half.re[column][j] = y.at[j]; });
  }
  static void columns_back(const float* planes, int64_t plane, Half& half) {
    real_column_back(planes, plane, half, 0);
    real_column_back(planes, plane, half, kLast);
    for (int column = 1; column < kLast; ++column) complex_column_back(planes, plane, half, column);
  }

  template <bool kStreaming>
  static NASDET_APART void map_row_back(const Half& half, int row, float* p, int64_t pixel, int first, int last,
                                        int64_t count) {
    Complexes<kLast + 1> x;
    unroll<kLast + 1>([&](auto k) {
      x.re[k] = half.re[k][row];
      if constexpr (int(decltype(k){}) % kLast != 0) x.im[k] = half.im[k][row];
    });
    const Reals<T> y = real_ifft<T>(x);
    unroll<T>([&](auto j) {
      float* const to = p + j * pixel;
      if (j < first || j >= last) return;
      if constexpr (kStreaming) store_streaming(to, y.at[j]);
      else store_up_to(to, y.at[j], count);
    });
  }
};

// Where one tile lies in its map, and what part of it is inside.
struct Placed {
  int64_t offset;  // elements from the map's start to the tile's corner, which may lie outside
  int row_first, row_last, column_first, column_last;
};

NASDET_INLINE Placed placed(const FrequencyTiles& t, int64_t index) {
  const int64_t image = index / (t.rows * t.columns), rest = index % (t.rows * t.columns);
  const int64_t row = rest / t.columns * t.step_h - t.margin_h, column = rest % t.columns * t.step_w - t.margin_w;
  const auto first = [&](int64_t corner, int margin) { return int(t.inner ? margin : corner < 0 ? -corner : 0); };
  const auto last = [&](int64_t room, int margin, int step) {
    const int64_t most = step + (t.inner ? 1 : 2) * margin;
    return int(room < most ? room : most);
  };
  return {((image * t.height + row) * t.width + column) * t.channels, first(row, t.margin_h),
          last(t.height - row, t.margin_h, t.step_h), first(column, t.margin_w),
          last(t.width - column, t.margin_w, t.step_w)};
}

NASDET_INLINE int64_t lanes_used(int64_t channels, int64_t first) {
  return channels - first < kFloats ? channels - first : kFloats;
}

// Where the planes of a tile's vector of channels begin, in a spectrum of T * T planes.
template <int T> NASDET_INLINE float* planes_of(const FrequencyPlanes& planes, int64_t tile, int64_t channel) {
  const int64_t block = channel / planes.block;
  return planes.data + block * T * T * planes.plane + tile * planes.block + channel - block * planes.block;
}

template <int T>
void spectra(const FrequencyTiles& t, const FrequencyPlanes& out, const float* map, int64_t begin, int64_t end) {
  using Two = Tile<T>;
  const int64_t vectors = out.channels / kFloats;
  typename Two::Half half;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = i / vectors;
    const int64_t channel = i % vectors * kFloats;
    const int64_t count = lanes_used(t.channels, out.first_channel + channel);
    const Placed at = placed(t, t.first_tile + tile);
    const float* const corner = map + at.offset + out.first_channel + channel;
    const bool inside = at.column_first == 0 && at.column_last == T && count == kFloats;
    for (int row = 0; row < T; ++row) {
      const float* const p = corner + row * t.width * t.channels;
      if (row < at.row_first || row >= at.row_last)
        for (int k = 0; k <= T / 2; ++k) half.re[k][row] = half.im[k][row] = Lane{};
      else if (inside) Two::template map_row<true>(p, t.channels, 0, T, kFloats, half, row);
      else Two::template map_row<false>(p, t.channels, at.column_first, at.column_last, count, half, row);
    }
    Two::columns(half, planes_of<T>(out, tile, channel), out.plane, out.streaming);
  }
  streaming_fence();
}

// One tile's vector of channels back into its map.
template <int T, bool kStreaming>
NASDET_INLINE void map_back(const FrequencyTiles& t, const FrequencyPlanes& in, float* map, int64_t tile,
                            int64_t channel) {
  using Two = Tile<T>;
  const Placed at = placed(t, t.first_tile + tile);
  const int64_t count = lanes_used(t.channels, in.first_channel + channel);
  typename Two::Half half;
  Two::columns_back(planes_of<T>(in, tile, channel), in.plane, half);
  float* const corner = map + at.offset + in.first_channel + channel;
  for (int row = at.row_first; row < at.row_last; ++row)
    Two::template map_row_back<kStreaming>(half, row, corner + row * t.width * t.channels, t.channels, at.column_first,
                                           at.column_last, count);
}

template <int T> void maps(const FrequencyTiles& t, const FrequencyPlanes& in, float* map, int64_t begin, int64_t end) {
  const int64_t vectors = in.channels / kFloats;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = i / vectors, channel = i % vectors * kFloats;
    if (kBytes == 64 && t.streaming) map_back<T, true>(t, in, map, tile, channel);
    else map_back<T, false>(t, in, map, tile, channel);
  }
  if (t.streaming) streaming_fence();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
