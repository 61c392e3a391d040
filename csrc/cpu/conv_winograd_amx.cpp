// The products of Winograd's convolution on matrix tiles: compiled with their instructions, and with emulated ones for tests.
// conv_winograd.cpp runs them where the CPU has tiles.
#if defined(NASDET_REGISTER) || defined(__AMX_BF16__)
#include "winograd_amx_grad.h"

namespace nasdet::NASDET_ISA {

void winograd_amx_weights(const WinogradAmx& job, int64_t column, int64_t block, char* to) {
  // Together the weights are larger than a core's cache.
  split_weights<true>(job.product, column, block, to, job.weight_plane);
  streaming_fence();
}

void winograd_amx_chunk(const WinogradAmx& job, int64_t first, int64_t count, char* scratch) {
  amx_chunk(job, first, count, scratch);
}

void winograd_amx_inputs(const WinogradAmx& job, int64_t index, char* scratch) {
  amx_split_inputs(job, index, scratch);
}

void winograd_amx_columns(const WinogradAmx& job, int64_t first, int64_t count, char* scratch) {
  amx_columns(job, first, count, scratch);
}

void winograd_amx_gradient(const WinogradGradient& g, int64_t plane, char* scratch) {
  amx_gradient_plane(g, plane, scratch);
}

}  // namespace nasdet::NASDET_ISA
#endif
