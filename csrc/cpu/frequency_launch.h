// The convolution in the frequency domain, step by step: spectra, products, and back.
#pragma once
#include <cstring>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "frequency_plan.h"
#include "nasdet/checks.h"

namespace nasdet {
namespace {

#ifdef NASDET_X86
#define NASDET_FREQUENCY_KERNEL(name) (cpu_capability() >= Isa::avx512 ? avx512::name : avx2::name)



const char* frequency_why_not(const ConvProblem& p) {
  if (cpu_capability() < Isa::avx2) return "the frequency domain needs AVX2";
  if (p.storage != 0) return "the frequency domain takes float32 only";
  if (p.kernel != 3) return "the frequency domain takes 3x3 kernels only";
  if (p.stride_h != 1 || p.stride_w != 1) return "the frequency domain takes stride 1 only";
  if (p.groups != 1) return "the frequency domain takes one group only";
  FrequencyGeometry g;
  return frequency_geometry(p, 32, g) ? nullptr : "the frequency domain takes dilations of up to 14 only";
}

// Results are fresh memory: their first touch costs far less in huge pages.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge, end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

double frequency_seconds(const ConvProblem& p, bool backward) {
  const FrequencyPlanner planner(p);
  if (!backward) return planner.convolution(p.in_channels, p.out_channels).seconds;
  return planner.convolution(p.out_channels, p.in_channels).seconds + planner.gradient().seconds;
}

int64_t vectors_of(int64_t channels) { return padded_to(channels, frequency_costs().lanes) / frequency_costs().lanes; }

std::vector<FrequencyBranch> frequency_branches(const ConvProblem& p) {
  std::vector<FrequencyBranch> branches;
  for (const ConvBranch& b : p.branches)
    branches.push_back({b.first, b.last, b.dilation_h, b.dilation_w, static_cast<const float*>(b.weight), static_cast<const float*>(b.mix), static_cast<float*>(b.weight_grad), nullptr});
  return branches;
}

// Memory for the grids of taps of the threads that work at once, and their ranges of the work.
struct GridSlots {
  int64_t count, each;
  GridSlots(int64_t units, const FrequencyGeometry& g) : count(std::min<int64_t>(units, torch::stable::get_num_threads())), each(2 * g.grid * g.grid * frequency_costs().lanes * frequency_costs().lanes) {}
  size_t elements() const { return size_t(count * each); }

  template <class Kernel> void run(Kernel kernel, const FrequencyGeometry& g, const FrequencyWeights& w, float* grids, int64_t units) const {
    const int64_t slots = std::min(count, units);
    torch::stable::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        FrequencyWeights own = w;
        own.grids = grids + slot * each;
        kernel(g.tile, g.grid, own, units * slot / slots, units * (slot + 1) / slots);
      }
    });
  }
};

void run_spectra(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, const float* map, FrequencyForm form) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_spectra);
  torch::stable::parallel_for(0, tiles.tiles * vectors_of(planes.channels), 1, [&](int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, form, begin, end); });
}

void run_products(const FrequencyGeometry& g, const FrequencyProduct& product) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_multiply);
  torch::stable::parallel_for(0, g.planes(), 1, [&](int64_t begin, int64_t end) { kernel(product, begin, end); });
}

void run_maps(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, float* map) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_maps);
  torch::stable::parallel_for(0, tiles.tiles * vectors_of(planes.channels), 1, [&](int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, begin, end); });
}

void run_add_maps(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, float* map) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_add_maps);
  const int phases = (g.tile + g.step_h - 1) / g.step_h;
  const int64_t rows = tiles.tiles / g.columns;
  for (int phase = 0; phase < phases && phase < rows; ++phase)
    torch::stable::parallel_for(0, (rows - phase + phases - 1) / phases * vectors_of(planes.channels), 1,
                                [&](int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, phase, phases, begin, end); });
}

void clear_map(float* map, int64_t count) {
  constexpr int64_t kPart = 1 << 16;
  torch::stable::parallel_for(0, (count + kPart - 1) / kPart, 1, [&](int64_t begin, int64_t end) {
    std::memset(map + begin * kPart, 0, size_t(std::min(end * kPart, count) - begin * kPart) * sizeof(float));
  });
}

// `to` = the convolution of `from`; for the gradient of the input, with the kernels turned round and the channels swapped.
void convolve(const ConvProblem& p, const float* from, float* to, bool transposed) {
  const int64_t in = transposed ? p.out_channels : p.in_channels, out = transposed ? p.in_channels : p.out_channels;
  const int64_t lanes = frequency_costs().lanes, in_padded = padded_to(in, lanes);
  const FrequencyPlan plan = FrequencyPlanner(p).convolution(in, out);
  const FrequencyGeometry& g = plan.g;
  const std::vector<FrequencyBranch> branches = frequency_branches(p);
  const int64_t units = vectors_of(plan.outs) * vectors_of(plan.ins), planes = g.planes();
  const int64_t from_plane = plan.map_plane(in_padded), to_plane = plan.map_plane(plan.outs), weight_plane = plan.weight_plane();
  const GridSlots slots(units, g);
  Scratch scratch(Scratch::padded(size_t(planes * from_plane) * 4) + Scratch::padded(size_t(planes * to_plane) * 4) + Scratch::padded(size_t(planes * weight_plane) * 4) +
                  Scratch::padded(slots.elements() * 4));
  float* const from_planes = scratch.take<float>(size_t(planes * from_plane));
  float* const to_planes = scratch.take<float>(size_t(planes * to_plane));
  float* const weight_planes = scratch.take<float>(size_t(planes * weight_plane));
  float* const grids = scratch.take<float>(slots.elements());
  advise_huge_pages(to, p.images * p.height * p.width * out * 4);
  if (transposed) clear_map(to, p.images * p.height * p.width * out);
  int64_t loaded_out = -1, loaded_in = -1;
  for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
    const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
    run_spectra(g, g.tiles(p, in, !transposed, row, rows), {from_planes, from_plane, in_padded, 0, planes * from_plane * 4 >= kFrequencyCached}, from, FrequencyForm::kFactor);
    for (int64_t o = 0; o < out; o += plan.outs) {
      const int64_t outs = std::min(plan.outs, out - o), width = padded_to(outs, lanes);
      for (int64_t i = 0; i < in; i += plan.ins) {
        const int64_t ins = std::min(plan.ins, in - i);
        if (loaded_out != o || loaded_in != i) {
          FrequencyWeights w{branches.data(), int64_t(branches.size()), p.in_channels, p.out_channels, g.radius_h, i, ins, o, outs, transposed, weight_planes, weight_plane,
                             planes * weight_plane * 4 >= kFrequencyCached, nullptr};
          if (transposed) std::swap(w.first_in, w.first_out), std::swap(w.ins, w.outs);
          slots.run(NASDET_FREQUENCY_KERNEL(frequency_weights), g, w, grids, vectors_of(outs) * vectors_of(ins));
          loaded_out = o, loaded_in = i;
        }
        run_products(g, {from_planes + i, weight_planes, to_planes, from_plane, weight_plane, to_plane, in_padded, 1, width, 0, tiles, width, ins, i > 0});
      }
      const FrequencyPlanes result{to_planes, to_plane, width, o, false};
      if (transposed) run_add_maps(g, g.tiles(p, out, true, row, rows), result, to);
      else run_maps(g, g.tiles(p, out, false, row, rows), result, to);
    }
  }
}

// The products of the spectra of x and of the gradient, back to taps.
void weight_gradients(const ConvProblem& p, const float* x, const float* grad) {
  const int64_t lanes = frequency_costs().lanes, in_vectors = vectors_of(p.in_channels);
  const FrequencyGradientPlan plan = FrequencyPlanner(p).gradient();
  const FrequencyGeometry& g = plan.g;
  std::vector<FrequencyBranch> branches = frequency_branches(p);
  for (const ConvBranch& b : p.branches)
    if (b.weight_grad) advise_huge_pages(b.weight_grad, (b.last - b.first) * p.in_channels * p.kernel * p.kernel * 4);
  int64_t mix_parts = 0;
  for (const ConvBranch& b : p.branches) mix_parts += b.mix_grad ? in_vectors * (b.last - b.first) : 0;
  std::vector<float> parts(static_cast<size_t>(mix_parts));
  mix_parts = 0;
  for (size_t b = 0; b < branches.size(); ++b)
    if (p.branches[b].mix_grad) branches[b].mix_grad_part = parts.data() + mix_parts, mix_parts += in_vectors * (branches[b].last - branches[b].first);

  const int64_t planes = g.planes(), x_plane = plan.map_plane(plan.ins), grad_plane = plan.map_plane(plan.outs), part_plane = plan.part_plane();
  const GridSlots slots(vectors_of(plan.part_ins) * vectors_of(plan.part_outs), g);
  Scratch scratch(Scratch::padded(size_t(planes * x_plane) * 4) + Scratch::padded(size_t(planes * grad_plane) * 4) + Scratch::padded(size_t(planes * part_plane) * 4) +
                  Scratch::padded(slots.elements() * 4));
  float* const x_planes = scratch.take<float>(size_t(planes * x_plane));
  float* const grad_planes = scratch.take<float>(size_t(planes * grad_plane));
  float* const part_planes = scratch.take<float>(size_t(planes * part_plane));
  float* const grids = scratch.take<float>(slots.elements());
  int64_t loaded_x[2] = {-1, -1}, loaded_grad[2] = {-1, -1};  // first channel and row
  for (int64_t o = 0; o < p.out_channels; o += plan.outs)
    for (int64_t i = 0; i < p.in_channels; i += plan.ins) {
      const int64_t outs = std::min(plan.outs, p.out_channels - o), ins = std::min(plan.ins, p.in_channels - i);
      const int64_t x_width = padded_to(ins, lanes), grad_width = padded_to(outs, lanes);
      for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
        const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
        if (loaded_grad[0] != o || loaded_grad[1] != row)
          run_spectra(g, g.tiles(p, p.out_channels, false, row, rows), {grad_planes, grad_plane, grad_width, o, planes * grad_plane * 4 >= kFrequencyCached}, grad, FrequencyForm::kConjugateFactor);
        if (loaded_x[0] != i || loaded_x[1] != row)
          run_spectra(g, g.tiles(p, p.in_channels, true, row, rows), {x_planes, x_plane, x_width, i, planes * x_plane * 4 >= kFrequencyCached}, x, FrequencyForm::kFactor);
        loaded_grad[0] = o, loaded_grad[1] = row, loaded_x[0] = i, loaded_x[1] = row;
        const bool final = row + plan.rows >= g.all_rows;
        for (int64_t part_o = 0; part_o < outs; part_o += plan.part_outs)
          for (int64_t part_i = 0; part_i < ins; part_i += plan.part_ins) {
            const int64_t os = std::min(plan.part_outs, outs - part_o), is = std::min(plan.part_ins, ins - part_i), width = padded_to(os, lanes);
            run_products(g, {x_planes + part_i, grad_planes + part_o, part_planes, x_plane, grad_plane, part_plane, 1, x_width, width, grad_width, is, width, tiles, row > 0});
            if (!final) continue;
            const FrequencyWeights w{branches.data(), int64_t(branches.size()), p.in_channels, p.out_channels, g.radius_h, i + part_i, is, o + part_o, os, false, part_planes, part_plane,
                                     false, nullptr};
            slots.run(NASDET_FREQUENCY_KERNEL(frequency_weight_gradients), g, w, grids, vectors_of(os) * vectors_of(is));
          }
      }
    }
  for (size_t b = 0; b < branches.size(); ++b)
    for (int64_t o = 0, count = branches[b].last - branches[b].first; branches[b].mix_grad_part && o < count; ++o) {
      double sum = 0;
      for (int64_t v = 0; v < in_vectors; ++v) sum += branches[b].mix_grad_part[v * count + o];
      static_cast<float*>(p.branches[b].mix_grad)[o] = float(sum);
    }
}

void frequency_forward(const ConvProblem& p, const void* x, void* y) { convolve(p, static_cast<const float*>(x), static_cast<float*>(y), false); }

void frequency_backward(const ConvProblem& p, const void* x, const void* grad, void* dx) {
  bool wanted = false;
  for (const ConvBranch& b : p.branches) wanted |= b.weight_grad || b.mix_grad;
  if (dx) convolve(p, static_cast<const float*>(grad), static_cast<float*>(dx), true);
  if (wanted) weight_gradients(p, static_cast<const float*>(x), static_cast<const float*>(grad));
}

#else
const char* frequency_why_not(const ConvProblem&) { return "the frequency domain needs AVX2"; }
double frequency_seconds(const ConvProblem&, bool) { return 0; }
void frequency_forward(const ConvProblem&, const void*, void*) {}
void frequency_backward(const ConvProblem&, const void*, const void*, void*) {}
#endif

}  // namespace
}  // namespace nasdet
