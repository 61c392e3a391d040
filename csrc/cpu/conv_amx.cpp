// The direct algorithm for bfloat16 on matrix tiles: compiled with their instructions, and with emulated ones for tests.
// conv_direct.cpp runs it where the CPU has them.
#if defined(NASDET_REGISTER) || defined(__AMX_BF16__)
#include "conv_amx_sums.h"
#include "conv_amx_weight_grad.h"

namespace nasdet::NASDET_ISA {

bool conv_amx_copy_row(const TileCopy& job, int64_t index) { return copy_row(job, index); }

void conv_amx_pair_plane(const TileCopy& job, char* pairs, int64_t index) { pair_plane(job, pairs, index); }

bool conv_amx_turn_chunk(const TileChunks& job, const void* zeros, int64_t chunk) {
  return turn_chunk(job, zeros, chunk);
}

void conv_amx_sums(const TileSums& job, const ConvPanel& panel, const char* source, int64_t image, int64_t first_block,
                   int64_t last_block) {
  tile_sums(job, panel, source, image, first_block, last_block);
}

void conv_amx_grad(const TileGrad& job) { tile_grad(job); }

void conv_amx_turn_sums(float* sums, int64_t taps, int64_t width, int64_t channels) {
  turn_sums(sums, taps, width, channels);
}

}  // namespace nasdet::NASDET_ISA
#endif
