// NCHW: lanes are columns. Rows are copied into a ring first, amid zeros, in the type of the arithmetic and split by the
// columns' phase, so that every load is a whole vector.
#pragma once
#include "depthwise_conv2d_tiles.h"

namespace nasdet::NASDET_ISA {
namespace {

template <class S> NASDET_INLINE arithmetic_t<S> widened(S value) { return value; }
template <> NASDET_INLINE float widened<Half>(Half value) { return half_to_float(value.bits); }
template <> NASDET_INLINE float widened<BFloat16>(BFloat16 value) {
  const uint32_t word = uint32_t(value.bits) << 16;
  float out;
  __builtin_memcpy(&out, &word, 4);
  return out;
}

// values[i] = row[i], to the type of the arithmetic.
template <class S> NASDET_INLINE void widen_row(const S* row, int64_t count, arithmetic_t<S>* values) {
  constexpr int L = kWidth<S>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(values + i, load(row + i));
  if (i < count) store_part(values + i, load_part(row + i, count - i), count - i);
}

// values[f][i] = row[phases * i + f - margin] where the row has it; `length` values of each phase. The others stay as they are: zero.
template <class S>
NASDET_INLINE void copy_row(const S* row, int64_t width, int64_t phases, int64_t margin, int64_t length,
                            arithmetic_t<S>* values) {
  if (phases == 1) return widen_row(row, width < length - margin ? width : length - margin, values + margin);
  for (int64_t f = 0; f < phases; ++f) {
    arithmetic_t<S>* const own = values + f * length;
    const int64_t first = margin > f ? (margin - f + phases - 1) / phases : 0;
    const int64_t end = (margin + width - f + phases - 1) / phases;
    const int64_t last = end < length ? end : length;
    const S* const from = row + f - margin;
    if (phases == 2)
      for (int64_t i = first; i < last; ++i) own[i] = widened(from[2 * i]);
    else
      for (int64_t i = first; i < last; ++i) own[i] = widened(from[phases * i]);
  }
}

// row[step * i] = values[i].
template <class S> void spread_row(const arithmetic_t<S>* values, int64_t count, int64_t step, S* row) {
  constexpr int L = kWidth<S>;
  for (int64_t i = 0; i < count; i += L) {
    S part[L];
    const int64_t n = count - i < L ? count - i : L;
    store(part, load(values + i));  // more than the values may be read: they are followed by others
    for (int64_t k = 0; k < n; ++k) row[(i + k) * step] = part[k];
  }
}
template <class S> NASDET_INLINE void narrow_row(const arithmetic_t<S>* values, int64_t count, S* row) {
  constexpr int L = kWidth<S>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(row + i, load(values + i));
  if (i < count) store_part(row + i, load_part(values + i, count - i), count - i);
}

constexpr int64_t kFetchAhead = 4096;  // bytes: a plane's rows are too short for the processor to see where they lead

// The copies of a plane's rows: the last `ring` of them, a row of zeros, and how far copying has come.
template <class S> struct Ring {
  using T = arithmetic_t<S>;
  const S* plane;
  int64_t width, phases, margin, length, ring, row, next = 0;
  T *copies, *zeros;

  T* at(int64_t i) const { return copies + (i < ring ? i : i % ring) * row; }
  void reach(int64_t last) {  // all rows up to `last`, which come in ascending order
    for (; next <= last; ++next) {
      fetch(plane + next * width + kFetchAhead / int64_t(sizeof(S)), width);
      copy_row(plane + next * width, width, phases, margin, length, at(next));
    }
  }
};

template <class S, class Job> NASDET_INLINE Ring<S> ring_of(const Job& p, const void* plane, arithmetic_t<S>* memory) {
  const int64_t phases = p.columns->advance;
  return {static_cast<const S*>(plane), p.from.width, phases, p.margin, p.row / phases, p.ring, p.row, 0, memory,
          memory + p.ring * p.row};
}

// Before the first plane: what lies around the rows of all of them, and the row of zeros.
template <class T, class Job> void clear_ring(const Job& p, void* scratch) {
  for (int64_t i = 0; i < (p.ring + 1) * p.row; ++i) static_cast<T*>(scratch)[i] = 0;
}

// The sources of a tile, copied if they are not yet.
template <class S>
NASDET_INLINE void find_copies(Sources<arithmetic_t<S>>& found, Ring<S>& ring, const DepthwiseTile& tile, bool shared) {
  using T = arithmetic_t<S>;
  const DepthwiseAxis& a = *tile.axis;
  if (a.taps > 0) {
    const int64_t top = a.base[0] > a.base[a.taps - 1] ? a.base[0] : a.base[a.taps - 1];
    const int64_t last = (tile.first + (tile.rows - 1) * tile.spacing) * a.advance + top;
    ring.reach(last < a.source ? last : a.source - 1);
  }
  find_sources<T>(found, tile, shared, ring.zeros, [&](int64_t i) { return ring.at(i); });
}

// Sums of some rows, from column `from` of rows that end at `end`.
template <class V, int kRows, int kVectors_, class T>
NASDET_INLINE void store_sums(const V (&sum)[kRows][kVectors_], T* const (&rows)[kDepthwiseRows], int64_t from,
                              int64_t end) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors_; ++v) {
      const int64_t at = from + v * kLanes<T>;
      if (end - at >= kLanes<T>) store(rows[r] + at, sum[r][v]);
      else store_part(rows[r] + at, sum[r][v], end - at);
    }
}

// One plane. `scratch`: the ring and a row of zeros, cleared before the first plane, and 7 target rows rounded up to whole blocks.
template <class S> void convolve_plane(const DepthwisePlanes& p, int64_t plane, void* scratch) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  constexpr bool kSame = sizeof(S) == sizeof(T);
  const int64_t K = p.kernel;
  T* const memory = static_cast<T*>(scratch);
  Ring<S> ring = ring_of<S>(p, static_cast<const S*>(p.source) + plane * p.from.height * p.from.width, memory);
  T* const results = memory + (p.ring + 1) * p.row;
  const T* const weights = static_cast<const T*>(p.weights) + plane % p.from.channels * K * K;
  Sources<T> sources;
  const DepthwiseAxis* before = nullptr;
  for (int64_t t = 0; t < p.tile_count; ++t) {
    const DepthwiseTile tile = p.tiles[t];
    const DepthwiseAxis rows = *tile.axis;
    if (tile.axis != before) ring.next = 0, before = tile.axis;
    find_copies<S>(sources, ring, tile, rows_are_shared<T>(tile));
    for (int64_t lattice = 0; lattice < p.column_lattices; ++lattice) {
      const DepthwiseAxis a = p.columns[lattice];
      const bool direct = kSame && a.step == 1;
      const int64_t pitch = (a.count + 2 * L - 1) / L * L;
      S* targets[kDepthwiseRows];
      T* outs[kDepthwiseRows];
      for (int64_t r = 0; r < tile.rows; ++r) {
        targets[r] = static_cast<S*>(p.target) +
                     (plane * p.to.height + rows.first + rows.step * (tile.first + r * tile.spacing)) * p.to.width +
                     a.first;
        outs[r] = direct ? reinterpret_cast<T*>(targets[r]) : results + r * pitch;
        if (lattice == 0) fetch(targets[r] + kFetchAhead / int64_t(sizeof(S)), p.to.width);
      }
      with_tile<T>(tile, [&](auto taps_, auto step_, auto rows_) __attribute__((always_inline)) {
        constexpr int kTaps = decltype(taps_)::value, kStep = decltype(step_)::value, R = decltype(rows_)::value;
        const int64_t passes = kTaps > 1 ? 1 : rows.taps;
        const auto block = [&](auto vectors_, int64_t w) __attribute__((always_inline)) {
          constexpr int V = decltype(vectors_)::value;
          vec<T> sum[R][V] = {};
          for (int64_t m = 0; m < passes; ++m) {
            const int64_t down = kTaps > 1 ? 0 : rows.tap[m];
            for (int64_t l = 0; l < a.taps; ++l) {
              const int64_t place = a.base[l] + p.margin;
              const int64_t offset = a.advance == 1 ? place : place % a.advance * ring.length + place / a.advance;
              add_products<kTaps, kStep, R, V, false>(sum, sources.rows + m * R, offset + w,
                                                      weights + down * K + a.tap[l], K);
            }
          }
          store_sums(sum, outs, w, direct ? a.count : pitch);
        };
        int64_t w = 0;
        for (; w + (kVectors - 1) * L < a.count; w += kVectors * L) block(Int<kVectors>{}, w);
        if (w < a.count) block(Int<1>{}, w);
      });
      for (int64_t r = 0; !direct && r < tile.rows; ++r)
        a.step == 1 ? narrow_row<S>(outs[r], a.count, targets[r]) : spread_row<S>(outs[r], a.count, a.step, targets[r]);
    }
  }
}

// The gradient of one channel's weights over all images, [kernel * kernel]. `scratch`: the ring, a row of zeros, 7 rows of the
// upstream gradient rounded up to whole vectors, and a vector for each weight; cleared for the first channel.
template <class S>
void grad_plane(const DepthwiseGrad& p, int64_t images, int64_t channel, bool first, void* scratch, double* total) {
  using T = arithmetic_t<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kTerms = 256;  // of a lane's sum in the arithmetic's type, about
  const int64_t K = p.kernel, pitch = (p.to.width + L - 1) / L * L;
  T* const memory = static_cast<T*>(scratch);
  T* const grads = memory + (p.ring + 1) * p.row;
  T* const sums = grads + kDepthwiseRows * pitch;
  const T* upstream[kDepthwiseRows];
  for (int r = 0; r < kDepthwiseRows; ++r) upstream[r] = grads + r * pitch;
  for (int64_t i = 0; i < K * K * L; ++i) sums[i] = 0;
  if (first) {
    clear_ring<T>(p, scratch);
    for (int64_t i = 0; i < kDepthwiseRows * pitch; ++i) grads[i] = 0;  // what lies beyond a row stays zero
  }
  for (int64_t i = 0; i < K * K; ++i) total[i] = 0;
  const auto flush = [&] {
    for (int64_t i = 0; i < K * K; ++i) {
      double sum = 0;
      for (int k = 0; k < L; ++k) sum += double(sums[i * L + k]), sums[i * L + k] = 0;
      total[i] += sum;
    }
  };
  Sources<T> sources;
  const DepthwiseAxis a = *p.columns;
  int64_t terms = 0;
  for (int64_t image = 0; image < images; ++image) {
    const int64_t plane = image * p.from.channels + channel;
    Ring<S> ring = ring_of<S>(p, static_cast<const S*>(p.source) + plane * p.from.height * p.from.width, memory);
    for (int64_t t = 0; t < p.tile_count; ++t) {
      const DepthwiseTile tile = p.tiles[t];
      const DepthwiseAxis rows = *tile.axis;
      find_copies<S>(sources, ring, tile, rows_are_shared<T>(tile));
      for (int64_t r = 0; r < tile.rows; ++r) {
        const S* const row =
            static_cast<const S*>(p.grad) + (plane * p.to.height + tile.first + r * tile.spacing) * p.to.width;
        fetch(row + kFetchAhead / int64_t(sizeof(S)), p.to.width);
        widen_row(row, p.to.width, grads + r * pitch);
      }
      terms += tile.rows * pitch / L;
      if (terms > kTerms) flush(), terms = tile.rows * pitch / L;
      with_tile<T>(tile, [&](auto taps_, auto step_, auto rows_) __attribute__((always_inline)) {
        constexpr int kTaps = decltype(taps_)::value, kStep = decltype(step_)::value, R = decltype(rows_)::value;
        const int64_t passes = kTaps > 1 ? 1 : rows.taps;
        for (int64_t m = 0; m < passes; ++m) {
          const int64_t down = kTaps > 1 ? 0 : rows.tap[m];
          const Correlated<T, T> of{upstream, L, sources.rows + m * R, L};
          for (int64_t l = 0; l < a.taps; ++l) {
            const int64_t place = a.base[l] + p.margin;
            const int64_t offset = a.advance == 1 ? place : place % a.advance * ring.length + place / a.advance;
            add_correlations<kTaps, kStep, R, 1>(sums + (down * K + a.tap[l]) * L, K * L, of, 0, offset, 0, pitch / L);
          }
        }
      });
    }
  }
  flush();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
