// What every CUDA launcher needs: the device's current stream, and errors with words.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include "nasdet/checks.h"
#include "storage.cuh"

// Weak: the library also loads beside a PyTorch without CUDA, which does not have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace nasdet::cuda {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "nasdet's CUDA kernels need a PyTorch with CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Reports a launch that could not start; never waits for one that did.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "nasdet could not launch ", kernel, ": ", cudaGetErrorString(error));
}

// f(S{}) with the type of the elements of t, the argument that an error would name.
template <class F> void with_storage(const Tensor& t, const char* name, F f) {
  switch (storage_code(t, name)) {
    case 0:
      return f(float{});
    case 1:
      return f(double{});
    case 2:
      return f(__nv_bfloat16{});
    case 3:
      return f(__half{});
  }
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace nasdet::cuda
