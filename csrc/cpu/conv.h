// What the algorithms behind the multi-dilation convolutions are given, and what each of them offers.
#pragma once
#include <cstdint>
#include <vector>

namespace nasdet {

// Output channels [first, last) convolved with one dilation. The mixture has a branch per dilation, each over all
// channels, and adds them up; the grouped form has one per slice of the channels, without overlap.
struct ConvBranch {
  int64_t first, last;
  int32_t dilation_h, dilation_w;
  const void* weight;  // [last - first][in_channels / groups][kernel][kernel]
  const void* mix;  // [last - first] factors in the type of the arithmetic (float; double for double); null: all are 1
  void* weight_grad;  // like weight; null: not wanted
  void* mix_grad;     // like mix; null: not wanted
};

// A convolution whose outputs sum over their branches; padding keeps the size at stride 1, for every dilation.
struct ConvProblem {
  int64_t images, in_channels, out_channels, groups;
  int64_t height, width, out_height, out_width;
  int32_t kernel, stride_h, stride_w;  // kernel x kernel taps, kernel odd
  int storage;                         // storage_code of maps and weights
  std::vector<ConvBranch> branches;
  bool input_grad = false;  // the backward is to give the gradient of the input

  int64_t map_floats() const { return images * (in_channels * height * width + out_channels * out_height * out_width); }
  bool weight_grads() const {
    for (const ConvBranch& b : branches)
      if (b.weight_grad || b.mix_grad) return true;
    return false;
  }
};

// Maps are dense and NHWC. Results are written, not added to. Every sum has an order that depends neither on the number
// of threads nor on the run.
struct ConvAlgorithm {
  const char* name;
  const char* (*why_not)(const ConvProblem&);            // why it cannot run this; null when it can
  double (*seconds)(const ConvProblem&, bool backward);  // an estimate for one thread, to choose by
  void (*forward)(const ConvProblem&, const void* x, void* y);
  void (*backward)(const ConvProblem&, const void* x, const void* grad, void* dx);  // dx null: no input_grad
};

extern const ConvAlgorithm kDirectConv, kFrequencyConv, kWinogradConv;

}  // namespace nasdet
