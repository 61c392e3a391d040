// nasdet._C: host-side work that touches no tensor. No torch header comes in here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "paste_rle.h"

namespace py = pybind11;

namespace {

using FloatArray = py::array_t<float, py::array::c_style>;

py::list paste_to_rle(const FloatArray& masks, const FloatArray& boxes, std::int64_t height, std::int64_t width,
                      float threshold, bool continuous, int threads) {
  if (masks.ndim() != 3 || masks.shape(1) != masks.shape(2) || masks.shape(1) < 1) {
    throw py::value_error("masks must have shape (n, M, M)");
  }
  if (boxes.ndim() != 2 || boxes.shape(0) != masks.shape(0) || boxes.shape(1) != 4) {
    throw py::value_error("boxes must have shape (n, 4), n that of masks");
  }
  if (height < 1 || width < 1 || height > INT32_MAX / width) {
    throw py::value_error("height and width must be positive, with fewer than 2^31 pixels");
  }
  if (!(threshold > 0.0F && threshold < 1.0F)) throw py::value_error("threshold must be between 0 and 1");
  if (threads < 1) throw py::value_error("threads must be at least 1");
  const auto grid = continuous ? nasdet::PasteGrid::kContinuous : nasdet::PasteGrid::kInteger;
  const nasdet::PasteOptions options{height, width, threshold, grid, threads};
  std::vector<std::string> counts;
  {
    const py::gil_scoped_release release;
    counts = nasdet::paste_to_rle(masks.data(), boxes.data(), masks.shape(0), masks.shape(1), options);
  }
  py::list result;
  for (const std::string& text : counts) {
    py::list size;
    size.append(height);
    size.append(width);
    py::dict entry;
    entry["size"] = size;
    entry["counts"] = py::bytes(text);
    result.append(entry);
  }
  return result;
}

}  // namespace

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
  m.def("paste_to_rle", &paste_to_rle, py::arg("masks").noconvert(), py::arg("boxes").noconvert(), py::arg("height"),
        py::arg("width"), py::arg("threshold"), py::arg("continuous"), py::arg("threads"),
        "Mask probabilities float32 [n, M, M] pasted into boxes float32 [n, 4] of an image, as COCO run-length "
        "encodings; both arrays C-contiguous. nasdet.detectors.parts.paste.paste_to_rle is the documented form.");
}
