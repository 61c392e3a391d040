// Memory for results of the CPU ops.
#pragma once
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "nasdet/op_checks.h"

namespace nasdet {

constexpr int64_t kHugePageResult = 4 << 20;  // bytes from which a result is worth huge pages

// Asks for huge pages, which take their first touch and scattered writes far better; a kernel without them ignores it.
inline const Tensor& on_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(t.const_data_ptr()),
                  last = first + uintptr_t(t.numel()) * t.element_size();
  const uintptr_t begin = (first + kHuge - 1) / kHuge * kHuge, end = last / kHuge * kHuge;
  if (int64_t(last - first) >= kHugePageResult && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

inline Tensor empty_result(const std::vector<int64_t>& shape, const Tensor& like, bool channels_last) {
  return on_huge_pages(empty_map(shape, like, channels_last));
}

}  // namespace nasdet
