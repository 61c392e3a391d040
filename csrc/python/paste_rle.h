// Pastes M x M mask probabilities into an image and run-length encodes them, column by column, without the image.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nasdet {

enum class PasteGrid {
  kInteger,    // the box, grown by the padding, rounded to whole pixels (torchvision)
  kContinuous  // pixel centres looked up in the box as it is (detectron2)
};

struct PasteOptions {
  std::int64_t height, width;  // of the image, in pixels
  float threshold;             // a pixel is set where its value is greater
  PasteGrid grid;
  int threads;  // at most; small jobs take one
};

// The compressed counts of COCO's run-length encoding of each mask. `masks` is [n, side, side], `boxes` [n, 4] as
// (x1, y1, x2, y2); both row-major. The result does not depend on the number of threads.
std::vector<std::string> paste_to_rle(const float* masks, const float* boxes, std::int64_t n, std::int64_t side,
                                      const PasteOptions& options);

}  // namespace nasdet
