// The convolution in the frequency domain: what it takes, what it costs, and both directions.
#pragma once
#include "frequency_plan.h"
#ifdef NASDET_X86
#include "frequency_convolve.h"
#include "frequency_weight_grad.h"
#endif

namespace nasdet {
namespace {

#ifdef NASDET_X86
const char* frequency_why_not(const ConvProblem& p) {
  if (cpu_capability() < Isa::avx2) return "the frequency domain needs AVX2";
  if (p.storage != 0) return "the frequency domain takes float32 only";
  if (p.kernel != 3) return "the frequency domain takes 3x3 kernels only";
  if (p.stride_h != 1 || p.stride_w != 1) return "the frequency domain takes stride 1 only";
  if (p.groups != 1) return "the frequency domain takes one group only";
  FrequencyGeometry g;
  return frequency_geometry(p, 32, g) ? nullptr : "the frequency domain takes dilations of up to 14 only";
}

double frequency_seconds(const ConvProblem& p, bool backward) {
  const FrequencyPlanner planner(p);
  if (!backward) return planner.forward().seconds;
  const FrequencyBackwardPlan plan = planner.backward();
  if (p.input_grad && p.weight_grads()) return plan.seconds;
  return (p.input_grad ? plan.dx.seconds : 0) + (p.weight_grads() ? plan.dw.seconds : 0);
}

void frequency_forward(const ConvProblem& p, const void* x, void* y) {
  const FrequencyPlan plan = FrequencyPlanner(p).forward();
  const Crew crew = crew_of(plan, padded_to(p.in_channels, frequency_costs().lanes), p.out_channels, 0);
  Scratch scratch(crew.bytes());
  convolve(p, plan, crew, static_cast<const float*>(x), static_cast<float*>(y), false, nullptr, scratch);
}

void frequency_backward(const ConvProblem& p, const void* x, const void* grad, void* dx) {
  const bool wanted = p.weight_grads();
  const FrequencyBackwardPlan plan = FrequencyPlanner(p).backward();
  const FrequencyGeometry& g = plan.dw.g;
  const FrequencySizes sizes = plan.dw.sizes();
  const bool shared = plan.shared && wanted && dx;
  const int64_t out_padded = padded_to(p.out_channels, frequency_costs().lanes);
  const int64_t block = block_of(out_padded);
  const int64_t plane = sizes.plane(block);
  const size_t elements = shared ? size_t(sizes.spectra(out_padded, block)) : 0, held = Scratch::padded(elements * 4);
  const Crew dx_crew = crew_of(plan.dx, out_padded, p.in_channels, held);
  const GradientCrew dw_crew(plan.dw, held);
  Scratch scratch(held + std::max(dx ? dx_crew.bytes() : 0, wanted ? dw_crew.bytes() : 0));
  float* const spectra = shared ? scratch.take<float>(elements) : nullptr;
  if (shared)
    run_spectra(g, g.tiles(p, p.out_channels, true, 0, g.all_rows),
                {spectra, plane, block, out_padded, 0, elements * 4 >= size_t(kFrequencyCached)},
                static_cast<const float*>(grad));
  const size_t mark = scratch.used();
  if (dx)
    convolve(p, plan.dx, dx_crew, static_cast<const float*>(grad), static_cast<float*>(dx), true, spectra, scratch);
  scratch.rewind(mark);
  if (wanted)
    WeightGradients(p, plan.dw, dw_crew, spectra, scratch)
        .run(static_cast<const float*>(x), static_cast<const float*>(grad));
}

#else
const char* frequency_why_not(const ConvProblem&) { return "the frequency domain needs AVX2"; }
double frequency_seconds(const ConvProblem&, bool) { return 0; }
void frequency_forward(const ConvProblem&, const void*, void*) {}
void frequency_backward(const ConvProblem&, const void*, const void*, void*) {}
#endif

}  // namespace
}  // namespace nasdet
