// nasdet._C: host-side work that touches no tensor. No torch header comes in here.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side helpers of nasdet";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = NASDET_VERSION;
        info["torch_target"] = NASDET_TORCH_TARGET;
        info["torch_headers"] = TORCH_HEADER_VERSION;
        info["compiler"] = NASDET_COMPILER;
        info["cuda_compiler"] = NASDET_CUDA_COMPILER;
        info["cuda_archs"] = NASDET_CUDA_ARCHS;
        return info;
      },
      "How this build was made: versions of the compilers and of the PyTorch headers, CUDA architectures.");
}
