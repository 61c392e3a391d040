// The direct algorithm: the branches' kernels folded over the union of their taps, and multiplied tap by tap.
#include "conv_direct_tiles.h"
#include "conv_direct_weight_grad.h"
#include "nasdet/isa.h"

NASDET_DECLARE_KERNEL(ConvShape, conv_direct_shape, int storage)
NASDET_DECLARE_KERNEL(int64_t, conv_direct_width, int storage, ConvForm, int64_t width)
NASDET_DECLARE_KERNEL(void, conv_direct_pack, const ConvPack&, const ConvPanel&)
NASDET_DECLARE_KERNEL(void, conv_direct_pair_rows, const ConvPanel&, int64_t rows, ConvForm)
NASDET_DECLARE_KERNEL(void, conv_direct_tiles, const ConvTiles&, int64_t first_pixel, int64_t last_pixel,
                      int64_t first_panel, int64_t last_panel)
NASDET_DECLARE_KERNEL(void, conv_direct_weight_grad, const ConvWeightGrad&)
NASDET_DECLARE_KERNEL(void, conv_direct_unfold, const ConvUnfold&, const ConvPanel&)

namespace nasdet::NASDET_ISA {

ConvShape conv_direct_shape(int storage) {
  const int64_t lanes = storage == 1 ? kLanes<double> : kLanes<float>;
  return {kPanelVectors * lanes, lanes, kHasPairs && storage == 2, false};
}

int64_t conv_direct_width(int storage, ConvForm form, int64_t width) {
  return storage == 1 ? padded_width<double>(form, width) : padded_width<float>(form, width);
}

void conv_direct_pack(const ConvPack& job, const ConvPanel& panel) {
  switch (job.storage) {
    case 0:
      return pack<float>(job, panel);
    case 1:
      return pack<double>(job, panel);
    case 2:
      return pack<BFloat16>(job, panel);
    case 3:
      return pack<Half>(job, panel);
  }
}

void conv_direct_pair_rows(const ConvPanel& panel, int64_t rows, ConvForm form) { pair_rows(panel, rows, form); }

void conv_direct_tiles(const ConvTiles& job, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel) {
  switch (job.storage) {
    case 0:
      return ConvBand<float>(job, first_panel, last_panel).run(first, last);
    case 1:
      return ConvBand<double>(job, first_panel, last_panel).run(first, last);
    case 2:
      return ConvBand<BFloat16>(job, first_panel, last_panel).run(first, last);
    case 3:
      return ConvBand<Half>(job, first_panel, last_panel).run(first, last);
  }
}

void conv_direct_weight_grad(const ConvWeightGrad& job) {
  switch (job.storage) {
    case 0:
      return ConvWeightGradTask<float>(job).run();
    case 1:
      return ConvWeightGradTask<double>(job).run();
    case 2:
      return ConvWeightGradTask<BFloat16>(job).run();
    case 3:
      return ConvWeightGradTask<Half>(job).run();
  }
}

void conv_direct_unfold(const ConvUnfold& job, const ConvPanel& panel) {
  switch (job.storage) {
    case 0:
      return unfold<float>(job, panel);
    case 1:
      return unfold<double>(job, panel);
    case 2:
      return unfold<BFloat16>(job, panel);
    case 3:
      return unfold<Half>(job, panel);
  }
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include "conv_direct_launch.h"

namespace nasdet {
const ConvAlgorithm kDirectConv = {"direct", direct_why_not, direct_seconds, direct_forward, direct_backward};
}
#endif
