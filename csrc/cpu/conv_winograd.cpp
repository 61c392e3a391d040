// Winograd's convolution F(4x4, 3x3) for float32, its data gradient and its weight gradient, of any dilation: the pixels that
// are a dilation apart form an image of their own. The kernels are for AVX2 and AVX-512; the baseline's run with emulated tiles only.
#include "nasdet/isa.h"
#include "winograd_plan.h"

NASDET_DECLARE_KERNEL(void, winograd_weights, const WinogradProduct&, int64_t first, int64_t last)
NASDET_DECLARE_KERNEL(void, winograd_tiles, const WinogradProduct&, int64_t first, int64_t count, float* scratch)
NASDET_DECLARE_KERNEL(void, winograd_column_inputs, const WinogradColumns&, int64_t first, int64_t count)
NASDET_DECLARE_KERNEL(void, winograd_columns, const WinogradColumns&, float* scratch)
NASDET_DECLARE_KERNEL(void, winograd_gradient_tiles, const WinogradGradient&)
NASDET_DECLARE_KERNEL(void, winograd_gradient_planes, const WinogradGradient&)
NASDET_DECLARE_KERNEL(void, winograd_gradient_collect, const WinogradGradient&, int64_t first, int64_t last)
NASDET_DECLARE_TILE_KERNEL(void, winograd_amx_weights, const WinogradAmx&, int64_t column, int64_t block, char* to)
NASDET_DECLARE_TILE_KERNEL(void, winograd_amx_chunk, const WinogradAmx&, int64_t first, int64_t count, char* scratch)
NASDET_DECLARE_TILE_KERNEL(void, winograd_amx_inputs, const WinogradAmx&, int64_t index, char* scratch)
NASDET_DECLARE_TILE_KERNEL(void, winograd_amx_columns, const WinogradAmx&, int64_t first, int64_t count, char* scratch)
NASDET_DECLARE_TILE_KERNEL(void, winograd_amx_gradient, const WinogradGradient&, int64_t plane, char* scratch)

#if !defined(__AVX512BF16__)
#include "winograd_kernels.h"

namespace nasdet::NASDET_ISA {

void winograd_weights(const WinogradProduct& p, int64_t first, int64_t last) {
  for (int64_t task = first; task < last; ++task) transform_weights(p, task);
}
void winograd_tiles(const WinogradProduct& p, int64_t first, int64_t count, float* scratch) {
  convolve_tiles(p, first, count, scratch);
}
void winograd_column_inputs(const WinogradColumns& job, int64_t first, int64_t count) {
  column_inputs(job, first, count);
}
void winograd_columns(const WinogradColumns& job, float* scratch) { convolve_columns(job, scratch); }
void winograd_gradient_tiles(const WinogradGradient& g) { gradient_tiles(g); }
void winograd_gradient_planes(const WinogradGradient& g) { gradient_planes(g); }
void winograd_gradient_collect(const WinogradGradient& g, int64_t first, int64_t last) {
  for (int64_t v = first; v < last; ++v) collect_gradient(g, v);
}

}  // namespace nasdet::NASDET_ISA
#endif

#ifdef NASDET_REGISTER
#include "winograd_launch.h"
#endif
