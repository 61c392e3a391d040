// Launcher-side helpers over the stable ABI: dtype dispatch, layouts, loops. Only for code under NASDET_REGISTER.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace nasdet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How a tensor's elements are stored; the same numbers on both sides of the instruction-set boundary.
constexpr int kStoredBFloat16 = 2;
inline int storage_code(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Double:
      return 1;
    case ScalarType::BFloat16:
      return kStoredBFloat16;
    case ScalarType::Half:
      return 3;
    default:
      STD_TORCH_CHECK(false, name, " must have dtype float32, float64, bfloat16 or float16, got ScalarType ",
                      int(t.scalar_type()));
  }
}

inline bool same(torch::headeronly::IntHeaderOnlyArrayRef a, torch::headeronly::IntHeaderOnlyArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return false;
  return true;
}

// `t` itself if its strides are those of `like` (size-1 dimensions do not count), else a copy in that layout.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  bool equal = true;
  for (int64_t d = 0; d < t.dim(); ++d) equal &= t.size(d) <= 1 || t.stride(d) == like.stride(d);
  if (equal) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

constexpr int64_t kStreamingBytes = 4 << 20;  // results beyond this would push useful data out of the caches

// Whether every instruction set's streaming stores accept the tensor's start.
inline bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 64 == 0; }

}  // namespace nasdet
