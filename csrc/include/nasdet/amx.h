// Matrix tiles: eight registers of up to 16 rows of 64 bytes, and the product of two of them, as Intel's AMX has them. Kernels
// on tiles are compiled with the instructions, and once with the same in plain C++, for tests on CPUs without.
#pragma once
#include "nasdet/simd.h"

namespace nasdet {

// A tile of bfloat16 has 16 rows, or 16 columns, of 32 terms: of a map the rows are positions and the terms channels, of a
// second operand each row has two terms of 16 columns side by side. A tile of sums is 16 x 16 floats.
constexpr int64_t kAmxSide = 16, kAmxTerms = 32, kAmxRowBytes = 64, kAmxTileBytes = kAmxSide * kAmxRowBytes;

namespace NASDET_ISA {

// The upper halves of two vectors, side by side in each lane: rows of the second operand of a tile's product.
NASDET_INLINE vec_u32 paired_halves(vec<float> even, vec<float> odd) {
  return ((vec_u32)even >> 16) | ((vec_u32)odd & 0xffff0000u);
}

#if defined(__AMX_BF16__)
inline constexpr bool kHasAmx = true;

// The tiles of this thread, 16 x 64 bytes each, for as long as this lives. The operands are in the order of the assembler.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette, start, unused[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape{1, 0, {}, {}, {}};
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~AmxTiles() { __asm__ volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int kTile> void zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
  template <int kTile> void load(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile> void store(void* rows, int64_t stride) const {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  // sum[i][j] += a[i][2k] * b[k][2j] + a[i][2k + 1] * b[k][2j + 1] for all k: 16 x 16 of float, 16 x 32 of bfloat16.
  template <int kSum, int kA, int kB> void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};
#else
inline constexpr bool kHasAmx = false;

class AmxTiles {
 public:
  template <int kTile> void zero() { __builtin_memset(tile_[kTile], 0, sizeof tile_[kTile]); }
  template <int kTile> void load(const void* rows, int64_t stride) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(tile_[kTile][i], static_cast<const char*>(rows) + i * stride, 64);
  }
  template <int kTile> void store(void* rows, int64_t stride) const {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(static_cast<char*>(rows) + i * stride, tile_[kTile][i], 64);
  }
  template <int kSum, int kA, int kB> void multiply() { add_products(tile_[kSum], tile_[kA], tile_[kB]); }

 private:
  // As the CPUs at hand, it rounds once for all terms. In these arrays there is nothing for the sanitizers to find.
  __attribute__((noinline, no_sanitize("address", "undefined"))) static void add_products(uint32_t (&sum)[16][16],
                                                                                          const uint32_t (&a)[16][16],
                                                                                          const uint32_t (&b)[16][16]) {
    float sums[16][16], halves[2][2][16][16];  // [first or second factor][first or second of a pair]
    __builtin_memcpy(sums, sum, sizeof sums);
    for (int factor = 0; factor < 2; ++factor) {
      uint32_t bits[2][16][16];
      for (int i = 0; i < 256; ++i) {
        const uint32_t pair = (factor ? b : a)[i / 16][i % 16];
        bits[0][i / 16][i % 16] = pair << 16, bits[1][i / 16][i % 16] = pair & 0xffff0000u;
      }
      __builtin_memcpy(halves[factor], bits, sizeof bits);
    }
    for (int i = 0; i < 16; ++i) {
      double row[16];
      for (int j = 0; j < 16; ++j) row[j] = sums[i][j];
      for (int k = 0; k < 16; ++k) {
        const double first = halves[0][0][i][k], second = halves[0][1][i][k];
        for (int j = 0; j < 16; ++j) row[j] += second * halves[1][1][k][j] + first * halves[1][0][k][j];
      }
      for (int j = 0; j < 16; ++j) sums[i][j] = float(row[j]);
    }
    __builtin_memcpy(sum, sums, sizeof sums);
  }

  uint32_t tile_[8][16][16];
};
#endif

}  // namespace NASDET_ISA
}  // namespace nasdet
