// Products of float32 on matrix tiles of bfloat16. A float is the sum of three bfloat16, and the product of two floats that of
// the six products of their parts that count: the three left out are about 2^-25 of it, less than a float's own rounding.
#pragma once
#include "nasdet/amx.h"

namespace nasdet::NASDET_ISA {
namespace {

constexpr int kFloatParts = 3;

NASDET_INLINE vec<float> rounded_to_bfloat16(vec<float> v) {
  return (vec<float>)(((vec_u32)v + 0x8000u) & 0xffff0000u);
}

// v as the sum of floats that are bfloat16, the largest first. Exact, but for infinity, NaN and what would be rounded to infinity,
// which have no parts; and tiles take a part below 2^-126 for zero.
NASDET_INLINE void split(vec<float> v, vec<float> (&part)[kFloatParts]) {
  part[0] = rounded_to_bfloat16(v);
  const vec<float> rest = v - part[0];
  part[1] = rounded_to_bfloat16(rest);
  part[2] = rest - part[1];
}

// Where a tile's rows are, a row `row` bytes after the other, those of the other parts `part` and of the next tile `tile` further.
struct TileOperand {
  const char* data;
  int64_t row, part, tile;
};

// Tiles 0 to 3, [kRows][2] of which kColumns are used, += a b over the 32 terms of a tile's row. after() runs after each part.
template <int kRows, int kColumns, class After>
NASDET_INLINE void add_float_products(AmxTiles& tiles, const TileOperand& a, const TileOperand& b, const After& after) {
  const auto load_a = [&](int part) {
    tiles.load<4>(a.data + part * a.part, a.row);
    if constexpr (kRows == 2) tiles.load<5>(a.data + part * a.part + a.tile, a.row);
  };
  const auto load_b = [&](int part) {
    tiles.load<6>(b.data + part * b.part, b.row);
    if constexpr (kColumns == 2) tiles.load<7>(b.data + part * b.part + b.tile, b.row);
  };
  const auto multiply = [&] {
    tiles.multiply<0, 4, 6>();
    if constexpr (kColumns == 2) tiles.multiply<1, 4, 7>();
    if constexpr (kRows == 2) tiles.multiply<2, 5, 6>();
    if constexpr (kRows == 2 && kColumns == 2) tiles.multiply<3, 5, 7>();
    after();
  };
  load_a(0), load_b(2), multiply();
  load_b(1), multiply();
  load_b(0), multiply();
  load_a(2), multiply();
  load_a(1), multiply();
  load_b(1), multiply();
}

}  // namespace
}  // namespace nasdet::NASDET_ISA
