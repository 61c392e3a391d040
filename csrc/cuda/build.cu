// Which CUDA this library has inside and what the driver offers: nasdet info prints it, and it marks the library as loaded.
#include "launch.h"

namespace nasdet::cuda {
namespace {

int64_t cuda_runtime() { return CUDART_VERSION; }

// The newest CUDA version that the installed driver serves (12080 = 12.8); 0 without a driver.
int64_t cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace
}  // namespace nasdet::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(nasdet, m) {
  m.def("_cuda_runtime() -> int");
  m.def("_cuda_driver() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(nasdet, CompositeExplicitAutograd, m) {
  m.impl("_cuda_runtime", TORCH_BOX(&nasdet::cuda::cuda_runtime));
  m.impl("_cuda_driver", TORCH_BOX(&nasdet::cuda::cuda_driver));
}
