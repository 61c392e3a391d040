// Where the pixels of a tile read: a table of pointers, zeros standing for what is outside of the map.
#pragma once
#include "conv_direct_jobs.h"
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {
namespace {

// x in every lane. x - 0 is x for the compiler too, which x + 0 is not: -0 + 0 is 0.
template <class V, class T> NASDET_INLINE V spread(T x) { return x - V{}; }

// Pixels [first, first + count) of a lattice, of which up to kMost are described at a time. Loops over them have kMost
// steps and no branches, as they run in vectors.
template <class S, int kMost> struct ConvPixels {
  int64_t place[kMost];                // of the source's element that the tap (0, 0) reads first
  int64_t down[kMost], across[kMost];  // and its row and column; down is beyond every map where there is no pixel
  int64_t target[kMost];               // the pixel's place in the target
  int64_t count;

  void find(const ConvMap& source, const ConvMap& to, const ConvLattice& l, int64_t first, int64_t wanted) {
    count = wanted;
    int64_t column = first % l.columns, row = first / l.columns % l.rows, n = first / l.columns / l.rows;
    for (int64_t i = 0; i < wanted;) {
      const int64_t from = row * l.source_step_h;
      const int64_t line = (n * source.height + from) * source.width * source.channels;
      const int64_t step = l.source_step_w * source.channels;
      const int64_t to_line = (n * to.height + l.first_row + row * l.step_h) * to.width + l.first_column;
      for (; i < wanted && column < l.columns; ++i, ++column) {
        down[i] = from, across[i] = column * l.source_step_w, place[i] = line + column * step;
        target[i] = to_line + column * l.step_w;
      }
      column = 0;
      if (++row == l.rows) row = 0, ++n;
    }
    for (int64_t i = wanted; i < kMost; ++i) down[i] = int64_t(1) << 60, across[i] = place[i] = target[i] = 0;
  }

  // rows[i]: the source pixel under a tap, or zeros. False if all are.
  bool under(const ConvMap& source, const S* zeros, int64_t tap_down, int64_t tap_across, const S** rows) const {
    const int64_t away = (tap_down * source.width + tap_across) * source.channels;
    const S* const data = static_cast<const S*>(source.data);
    uint64_t any = 0;
    for (int i = 0; i < kMost; ++i) {
      const bool inside = (uint64_t(down[i] + tap_down) < uint64_t(source.height)) &
                          (uint64_t(across[i] + tap_across) < uint64_t(source.width));
      rows[i] = inside ? data + (place[i] + away) : zeros;
      any |= inside;
    }
    return any;
  }
};

// `count` elements in the arithmetic's type.
template <class S> NASDET_INLINE void widen(const S* from, arithmetic_t<S>* to, int64_t count) {
  constexpr int W = kWidth<S>;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
