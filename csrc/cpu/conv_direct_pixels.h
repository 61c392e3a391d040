// Where the pixels of a tile read: a table of pointers, zeros standing for what is outside of the map.
#pragma once
#include "conv_direct_jobs.h"
#include "nasdet/simd.h"

namespace nasdet::NASDET_ISA {
namespace {

// x in every lane. x - 0 is x for the compiler too, which x + 0 is not: -0 + 0 is 0.
template <class V, class T> NASDET_INLINE V spread(T x) { return x - V{}; }

// Pixels [first, first + count) of a lattice, of which up to kMost are described at a time.
template <class S, int kMost> struct ConvPixels {
  const S* image[kMost];
  int64_t down[kMost], across[kMost];  // where the tap (0, 0) reads
  int64_t target[kMost];               // the pixel's place in the target
  int64_t count;

  void find(const ConvMap& source, const ConvMap& to, const ConvLattice& l, int64_t first, int64_t wanted) {
    count = wanted;
    int64_t column = first % l.columns, row = first / l.columns % l.rows, n = first / l.columns / l.rows;
    for (int64_t i = 0; i < wanted; ++i) {
      image[i] = static_cast<const S*>(source.data) + n * source.height * source.width * source.channels;
      down[i] = row * l.source_step_h, across[i] = column * l.source_step_w;
      target[i] = (n * to.height + l.first_row + row * l.step_h) * to.width + l.first_column + column * l.step_w;
      if (++column == l.columns) {
        column = 0;
        if (++row == l.rows) row = 0, ++n;
      }
    }
  }

  // rows[i]: the source pixel under a tap, or zeros. False if all are.
  bool under(const ConvMap& source, const S* zeros, int64_t tap_down, int64_t tap_across, int64_t room, const S** rows) const {
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t y = down[i] + tap_down, x = across[i] + tap_across;
      const bool inside = uint64_t(y) < uint64_t(source.height) && uint64_t(x) < uint64_t(source.width);
      rows[i] = inside ? image[i] + (y * source.width + x) * source.channels : zeros;
      any |= inside;
    }
    for (int64_t i = count; i < room; ++i) rows[i] = zeros;
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
