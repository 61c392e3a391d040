// What both directions of the convolution in the frequency domain share: scratch of the threads, spectra, and maps.
#pragma once
#include <vector>

#include "caches.h"
#include "frequency_plan.h"
#include "nasdet/checks.h"
#include "tasks.h"

namespace nasdet {
namespace {

#define NASDET_FREQUENCY_KERNEL(name) (cpu_capability() >= Isa::avx512 ? avx512::name : avx2::name)

int64_t vectors_of(int64_t channels) { return padded_to(channels, frequency_costs().lanes) / frequency_costs().lanes; }

std::vector<FrequencyBranch> frequency_branches(const ConvProblem& p, const TapFold& fold) {
  std::vector<FrequencyBranch> branches;
  for (const ConvBranch& b : p.branches) {
    branches.push_back({b.first,
                        b.last,
                        static_cast<const float*>(b.weight),
                        static_cast<const float*>(b.mix),
                        static_cast<float*>(b.weight_grad),
                        nullptr,
                        {}});
    fold.terms_of(b.dilation_h, b.dilation_w, branches.back().terms);
  }
  return branches;
}

// Scratch of the threads that work at once, and their ranges of the work.
struct Slots {
  int64_t count, each;
  Slots(int64_t units, int64_t threads, int64_t elements) : count(std::min(units, threads)), each(elements) {}
  size_t elements() const { return size_t(count * each); }

  // f(the slot's scratch, begin, end)
  template <class F> void run(float* scratch, int64_t units, const F& f) const {
    for_ranges(units, count, [&](int64_t slot, int64_t begin, int64_t end) { f(scratch + slot * each, begin, end); });
  }
};

// What the weights of a chunk need on their way, on so many threads; the plan must outlive it.
struct WeightScratch {
  const FrequencySizes sizes;
  int64_t folded_elements, threads;
  Slots steps;
  float *folded = nullptr, *step_data = nullptr;

  WeightScratch(const FrequencyPlan& plan, int64_t threads_at_once)
      : sizes(plan.sizes()),
        folded_elements(sizes.folded(plan.ins, plan.outs)),
        threads(threads_at_once),
        steps(frequency_steps(sizes.g.tile), threads, padded_to(sizes.step(), 16)) {}
  size_t bytes() const { return Scratch::padded(size_t(folded_elements) * 4) + Scratch::padded(steps.elements() * 4); }
  void take(Scratch& scratch) {
    folded = scratch.take<float>(size_t(folded_elements));
    step_data = scratch.take<float>(steps.elements());
  }

  void fold(const FrequencyWeights& w) const {
    const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_weights);
    for_ranges(vectors_of(w.outs) * vectors_of(w.ins), threads,
               [&](int64_t, int64_t begin, int64_t end) { kernel(sizes.g.tile, w, begin, end); });
  }

  // f(step, its scratch) for all steps.
  template <class F> void run_steps(const F& f) const {
    steps.run(step_data, frequency_steps(sizes.g.tile), [&](float* data, int64_t begin, int64_t end) {
      for (int64_t step = begin; step < end; ++step) f(int(step), data);
    });
  }
};

void run_spectra(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes,
                 const float* map) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_spectra);
  for_ranges(tiles.tiles * vectors_of(planes.channels), threads(),
             [&](int64_t, int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, begin, end); });
}

void run_maps(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, float* map) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_maps);
  for_ranges(tiles.tiles * vectors_of(planes.channels), threads(),
             [&](int64_t, int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, begin, end); });
}

}  // namespace
}  // namespace nasdet
