// RoIAlign over one or several levels, and its gradient. Geometry is found once per RoI (roi_align_plan.h); RoIs are
// walked in the order of level, image and place, so that neighbours find each other's pixels in the caches.
#include "nasdet/isa.h"
#include "roi_align_pixels.h"
#include "roi_align_planes.h"

NASDET_DECLARE_KERNEL(void, roi_align_pixels, const RoiJob&, const RoiWork* work, int64_t count)
NASDET_DECLARE_KERNEL(void, roi_align_planes, const RoiJob&, const RoiWork* work, int64_t count)
NASDET_DECLARE_KERNEL(void, roi_align_narrow, int storage, const float* from, int64_t from_stride, void* to,
                      int64_t to_stride, int64_t rows, int64_t count)
NASDET_DECLARE_KERNEL(int, roi_align_bytes)

namespace nasdet::NASDET_ISA {
namespace {

template <class S> void pixels(const RoiJob& job, const RoiWork* work, int64_t count) {
  if (job.gradient) roi_pixels<S, true, false>(job, work, count);
  else if (job.streaming) roi_pixels<S, false, true>(job, work, count);
  else roi_pixels<S, false, false>(job, work, count);
}
template <class S> void planes(const RoiJob& job, const RoiWork* work, int64_t count) {
  job.gradient ? roi_planes<S, true>(job, work, count) : roi_planes<S, false>(job, work, count);
}
template <class S>
void narrow_rows(const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r)
    roi_store_block<S>(from + r * from_stride, static_cast<S*>(to) + r * to_stride, count, false);
}

}  // namespace

void roi_align_pixels(const RoiJob& job, const RoiWork* work, int64_t count) {
  switch (job.storage) {
    case 0:
      return pixels<float>(job, work, count);
    case 1:
      return pixels<double>(job, work, count);
    case 2:
      return pixels<BFloat16>(job, work, count);
    case 3:
      return pixels<Half>(job, work, count);
  }
}

void roi_align_planes(const RoiJob& job, const RoiWork* work, int64_t count) {
  switch (job.storage) {
    case 0:
      return planes<float>(job, work, count);
    case 1:
      return planes<double>(job, work, count);
    case 2:
      return planes<BFloat16>(job, work, count);
    case 3:
      return planes<Half>(job, work, count);
  }
}

// `rows` rows of `count` float sums to rows of a 16-bit tensor.
void roi_align_narrow(int storage, const float* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                      int64_t count) {
  storage == 2 ? narrow_rows<BFloat16>(from, from_stride, to, to_stride, rows, count)
               : narrow_rows<Half>(from, from_stride, to, to_stride, rows, count);
}

int roi_align_bytes() { return kBytes; }

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include "roi_align_grad_launch.h"
#include "roi_align_launch.h"

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("multilevel_roi_align", TORCH_BOX(&nasdet::multilevel_roi_align));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&nasdet::multilevel_roi_align_backward));
}
#endif
