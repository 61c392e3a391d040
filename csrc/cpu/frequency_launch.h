// The convolution in the frequency domain, step by step: spectra, products, and back.
#pragma once
#include <cstring>
#include <vector>

#include "frequency_plan.h"
#include "nasdet/checks.h"
#include "tasks.h"

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

double frequency_seconds(const ConvProblem& p, bool backward) {
  const FrequencyPlanner planner(p);
  return backward ? planner.backward().seconds : planner.forward().seconds;
}

int64_t vectors_of(int64_t channels) { return padded_to(channels, frequency_costs().lanes) / frequency_costs().lanes; }

std::vector<FrequencyBranch> frequency_branches(const ConvProblem& p) {
  std::vector<FrequencyBranch> branches;
  for (const ConvBranch& b : p.branches)
    branches.push_back({b.first, b.last, b.dilation_h, b.dilation_w, static_cast<const float*>(b.weight), static_cast<const float*>(b.mix), static_cast<float*>(b.weight_grad), nullptr});
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

// What the weights of a chunk need on their way, on so many threads.
struct WeightScratch {
  const FrequencyGeometry& g;
  int64_t half_elements, step_plane;
  Slots grids, steps;
  float *halves = nullptr, *grid_data = nullptr, *step_data = nullptr;

  WeightScratch(const FrequencyGeometry& geometry, int64_t ins, int64_t outs, int64_t plane, int64_t threads)
      : g(geometry), half_elements(ins * outs * frequency_half(geometry.tile, geometry.grid)), step_plane(plane),
        grids(vectors_of(ins) * vectors_of(outs), threads, 2 * geometry.grid * geometry.grid * frequency_costs().lanes * frequency_costs().lanes),
        steps(frequency_steps(geometry.tile), threads, frequency_step_planes(geometry.tile, 0) * plane) {}
  size_t bytes() const { return Scratch::padded(size_t(half_elements) * 4) + Scratch::padded(grids.elements() * 4) + Scratch::padded(steps.elements() * 4); }
  void take(Scratch& scratch) {
    halves = scratch.take<float>(size_t(half_elements));
    grid_data = scratch.take<float>(grids.elements());
    step_data = scratch.take<float>(steps.elements());
  }

  // The weights to their halves, or with the other kernel back.
  template <class Kernel> void run_blocks(Kernel kernel, const FrequencyWeights& w) const {
    grids.run(grid_data, vectors_of(w.outs) * vectors_of(w.ins), [&](float* data, int64_t begin, int64_t end) {
      FrequencyWeights own = w;
      own.grids = data;
      kernel(g.tile, g.grid, own, begin, end);
    });
  }

  // f(step, its planes) for all steps.
  template <class F> void run_steps(const F& f) const {
    steps.run(step_data, frequency_steps(g.tile), [&](float* data, int64_t begin, int64_t end) {
      for (int64_t step = begin; step < end; ++step) f(int(step), data);
    });
  }
};

void run_spectra(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, const float* map, FrequencyForm form) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_spectra);
  for_ranges(tiles.tiles * vectors_of(planes.channels), threads(), [&](int64_t, int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, form, begin, end); });
}

void run_maps(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, float* map) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_maps);
  for_ranges(tiles.tiles * vectors_of(planes.channels), threads(), [&](int64_t, int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, begin, end); });
}

void run_add_maps(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, float* map) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_add_maps);
  const int phases = (g.tile + g.step_h - 1) / g.step_h;
  const int64_t rows = tiles.tiles / g.columns;
  for (int phase = 0; phase < phases && phase < rows; ++phase)
    for_ranges((rows - phase + phases - 1) / phases * vectors_of(planes.channels), threads(),
               [&](int64_t, int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, phase, phases, begin, end); });
}

void clear_map(float* map, int64_t count) {
  constexpr int64_t kPart = 1 << 16;
  for_ranges((count + kPart - 1) / kPart, threads(), [&](int64_t, int64_t begin, int64_t end) {
    std::memset(map + begin * kPart, 0, size_t(std::min(end * kPart, count) - begin * kPart) * sizeof(float));
  });
}

// Products of the spectra of a map with those of the weights between `ins` of its channels and `outs` others.
struct Products {
  const float* from;  // planes of the map, from the first of the channels
  float* to;
  int64_t from_plane, to_plane, from_row, tiles;
  bool add;
};
void multiply_by_weights(const WeightScratch& s, const FrequencyWeights& w, int64_t step_depth, const Products& m) {
  const int64_t depth = w.transposed ? w.outs : w.ins, width = padded_to(w.transposed ? w.ins : w.outs, frequency_costs().lanes);
  s.run_blocks(NASDET_FREQUENCY_KERNEL(frequency_weights), w);
  s.run_steps([&](int step, float* planes) {
    const int64_t first = frequency_step_first(s.g.tile, step), count = frequency_step_planes(s.g.tile, step);
    for (int64_t row = 0; row < depth; row += step_depth) {
      const int64_t rows = std::min(step_depth, depth - row);
      NASDET_FREQUENCY_KERNEL(frequency_weight_planes)(s.g.tile, s.g.grid, w, {step, planes, s.step_plane, row, rows, false});
      NASDET_FREQUENCY_KERNEL(frequency_multiply)
      ({m.from + first * m.from_plane + row, planes, m.to + first * m.to_plane, m.from_plane, s.step_plane, m.to_plane, m.from_row, 1, width, 0, m.tiles, width, rows, m.add || row > 0}, 0, count);
    }
  });
}

// Elements of the spectra of `channels` of the map in hand.
template <class Plan> size_t spectra_of(const Plan& plan, int64_t channels) { return size_t(plan.g.planes() * plan.map_plane(channels)); }

// A chunk of channels is worked on by one thread, with scratch of its own that stays in the caches, where there are enough
// chunks and memory; otherwise by all threads together, or as many as have room, which then read what others have just written.
struct Crew {
  static constexpr size_t kMostEach = 8 << 20;
  int64_t size, threads;  // chunks at once, and threads of each
  size_t shared, each;    // bytes
  size_t bytes() const { return shared + size_t(size) * each; }

  // each(threads): bytes of a chunk; `held`: those that the call holds besides
  template <class F> Crew(int64_t chunks, size_t held, size_t all, const F& each_on) : shared(all) {
    const int64_t most = nasdet::threads();
    const auto fits = [&](int64_t at_once, int64_t threads_of_each) { return int64_t(held + shared + size_t(at_once) * each_on(threads_of_each)) <= scratch_limit(); };
    size = std::min(most, chunks);
    const bool busy = 4 * chunks >= 3 * pieces_of(chunks, size) * most;  // three quarters of the time
    if (!busy || each_on(1) > kMostEach || !fits(size, 1)) size = 1;
    threads = size > 1 ? 1 : most;
    while (threads > 1 && !fits(size, threads)) --threads;
    each = each_on(threads);
  }

  // f(the one of the crew, its chunk)
  template <class F> void run(int64_t chunks, const F& f) const {
    for_tasks(chunks, size, [&](int64_t one, int64_t chunk) { f(size_t(one), chunk); });
  }
};

WeightScratch weight_scratch(const FrequencyPlan& plan, int64_t threads) { return {plan.g, plan.ins, plan.outs, plan.step_plane(), threads}; }
WeightScratch weight_scratch(const FrequencyGradientPlan& plan, int64_t threads) { return {plan.g, plan.part_ins, plan.part_outs, plan.step_plane(), threads}; }

// `held`: bytes of the spectra of all of the map, if they are there.
Crew crew_of(const FrequencyPlan& plan, int64_t in_padded, int64_t out, size_t held) {
  return {pieces_of(out, plan.outs), held, Scratch::padded(held ? 0 : spectra_of(plan, in_padded) * 4),
          [&](int64_t threads) { return Scratch::padded(spectra_of(plan, plan.outs) * 4) + weight_scratch(plan, threads).bytes(); }};
}
Crew crew_of(const FrequencyGradientPlan& plan, size_t held) {
  return {pieces_of(plan.ins, plan.part_ins) * pieces_of(plan.outs, plan.part_outs), held, Scratch::padded(spectra_of(plan, plan.ins) * 4) + Scratch::padded(held ? 0 : spectra_of(plan, plan.outs) * 4),
          [&](int64_t threads) { return weight_scratch(plan, threads).bytes(); }};
}

// The scratch of each of a crew.
template <class Plan> std::vector<WeightScratch> weight_scratches(const Plan& plan, const Crew& crew, Scratch& scratch) {
  std::vector<WeightScratch> all(size_t(crew.size), weight_scratch(plan, crew.threads));
  for (WeightScratch& one : all) one.take(scratch);
  return all;
}

// `to` = the convolution of `from`; for the gradient of the input, with the kernels turned round and the channels swapped.
// `spectra` of all of `from`, if they are there.
void convolve(const ConvProblem& p, const FrequencyPlan& plan, const Crew& crew, const float* from, float* to, bool gradient, const float* spectra, Scratch& scratch) {
  const int64_t in = gradient ? p.out_channels : p.in_channels, out = gradient ? p.in_channels : p.out_channels;
  const int64_t lanes = frequency_costs().lanes, in_padded = padded_to(in, lanes);
  const FrequencyGeometry& g = plan.g;
  const std::vector<FrequencyBranch> branches = frequency_branches(p);
  const int64_t planes = g.planes(), from_plane = plan.map_plane(in_padded), to_plane = plan.map_plane(plan.outs);
  float* const own = scratch.take<float>(spectra ? 0 : spectra_of(plan, in_padded));
  std::vector<float*> to_planes;
  for (int64_t one = 0; one < crew.size; ++one) to_planes.push_back(scratch.take<float>(spectra_of(plan, plan.outs)));
  const std::vector<WeightScratch> scratches = weight_scratches(plan, crew, scratch);
  if (gradient) clear_map(to, p.images * p.height * p.width * out);
  for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
    const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
    if (!spectra) run_spectra(g, g.tiles(p, in, !gradient, row, rows), {own, from_plane, in_padded, 0, planes * from_plane * 4 >= kFrequencyCached}, from, gradient ? FrequencyForm::kConjugateFactor : FrequencyForm::kFactor);
    crew.run(pieces_of(out, plan.outs), [&](size_t one, int64_t chunk) {
      const int64_t o = chunk * plan.outs, outs = std::min(plan.outs, out - o);
      for (int64_t i = 0; i < in; i += plan.ins) {
        FrequencyWeights w{branches.data(), int64_t(branches.size()), p.in_channels, p.out_channels, g.radius_h, i, std::min(plan.ins, in - i), o, outs, gradient, scratches[one].halves, nullptr};
        if (gradient) std::swap(w.first_in, w.first_out), std::swap(w.ins, w.outs);
        multiply_by_weights(scratches[one], w, plan.step_ins, {(spectra ? spectra : own) + i, to_planes[one], from_plane, to_plane, in_padded, tiles, i > 0});
      }
      const FrequencyPlanes result{to_planes[one], to_plane, padded_to(outs, lanes), o, false};
      if (gradient) run_add_maps(g, g.tiles(p, out, true, row, rows), result, to);
      else run_maps(g, g.tiles(p, out, false, row, rows), result, to);
    });
  }
}

// Branches with room for each block of inputs' part of the gradient of mix, in `parts`.
std::vector<FrequencyBranch> gradient_branches(const ConvProblem& p, std::vector<float>& parts) {
  std::vector<FrequencyBranch> branches = frequency_branches(p);
  const int64_t in_vectors = vectors_of(p.in_channels);
  int64_t count = 0;
  for (const ConvBranch& b : p.branches) count += b.mix_grad ? in_vectors * (b.last - b.first) : 0;
  parts.resize(size_t(count));
  count = 0;
  for (size_t b = 0; b < branches.size(); ++b)
    if (p.branches[b].mix_grad) branches[b].mix_grad_part = parts.data() + count, count += in_vectors * (branches[b].last - branches[b].first);
  return branches;
}

void sum_mix_gradients(const ConvProblem& p, const std::vector<FrequencyBranch>& branches) {
  for (size_t b = 0; b < branches.size(); ++b)
    for (int64_t o = 0, count = branches[b].last - branches[b].first; branches[b].mix_grad_part && o < count; ++o) {
      double sum = 0;
      for (int64_t v = 0; v < vectors_of(p.in_channels); ++v) sum += branches[b].mix_grad_part[v * count + o];
      static_cast<float*>(p.branches[b].mix_grad)[o] = float(sum);
    }
}

// Products of the spectra of x and of the output's gradient over tiles, back to halves.
struct GradientProducts {
  const float *x, *grad;  // planes, from the first of the channels
  int64_t x_plane, grad_plane, x_row, grad_row, tiles;
  bool add;
};
void gather_products(const WeightScratch& s, const FrequencyWeights& w, int64_t step_depth, const GradientProducts& m) {
  const int64_t width = padded_to(w.outs, frequency_costs().lanes);
  s.run_steps([&](int step, float* planes) {
    const int64_t first = frequency_step_first(s.g.tile, step), count = frequency_step_planes(s.g.tile, step);
    for (int64_t row = 0; row < w.ins; row += step_depth) {
      const int64_t rows = std::min(step_depth, w.ins - row);
      NASDET_FREQUENCY_KERNEL(frequency_multiply)
      ({m.x + first * m.x_plane + row, m.grad + first * m.grad_plane, planes, m.x_plane, m.grad_plane, s.step_plane, 1, m.x_row, width, m.grad_row, rows, width, m.tiles, false}, 0, count);
      NASDET_FREQUENCY_KERNEL(frequency_weight_planes_back)(s.g.tile, s.g.grid, w, {step, planes, s.step_plane, row, rows, m.add});
    }
  });
}

// The products of the spectra of x and of the gradient, back to taps. `spectra` of all of the gradient, if they are there.
void weight_gradients(const ConvProblem& p, const FrequencyGradientPlan& plan, const Crew& crew, const float* x, const float* grad, const float* spectra, Scratch& scratch) {
  const int64_t lanes = frequency_costs().lanes;
  const FrequencyGeometry& g = plan.g;
  std::vector<float> mix_parts;
  const std::vector<FrequencyBranch> branches = gradient_branches(p, mix_parts);
  const int64_t planes = g.planes(), x_plane = plan.map_plane(plan.ins), grad_plane = plan.map_plane(plan.outs);
  float* const x_planes = scratch.take<float>(spectra_of(plan, plan.ins));
  float* const own = scratch.take<float>(spectra ? 0 : spectra_of(plan, plan.outs));
  const std::vector<WeightScratch> scratches = weight_scratches(plan, crew, scratch);
  int64_t loaded_x[2] = {-1, -1}, loaded_grad[2] = {-1, -1};  // first channel and row
  for (int64_t o = 0; o < p.out_channels; o += plan.outs)
    for (int64_t i = 0; i < p.in_channels; i += plan.ins) {
      const int64_t outs = std::min(plan.outs, p.out_channels - o), ins = std::min(plan.ins, p.in_channels - i);
      const int64_t x_width = padded_to(ins, lanes), grad_width = padded_to(outs, lanes);
      for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
        const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
        if (!spectra && (loaded_grad[0] != o || loaded_grad[1] != row))
          run_spectra(g, g.tiles(p, p.out_channels, false, row, rows), {own, grad_plane, grad_width, o, planes * grad_plane * 4 >= kFrequencyCached}, grad, FrequencyForm::kConjugateFactor);
        if (loaded_x[0] != i || loaded_x[1] != row)
          run_spectra(g, g.tiles(p, p.in_channels, true, row, rows), {x_planes, x_plane, x_width, i, planes * x_plane * 4 >= kFrequencyCached}, x, FrequencyForm::kFactor);
        loaded_grad[0] = o, loaded_grad[1] = row, loaded_x[0] = i, loaded_x[1] = row;
        const int64_t in_parts = pieces_of(ins, plan.part_ins);
        crew.run(in_parts * pieces_of(outs, plan.part_outs), [&](size_t one, int64_t part) {
          const int64_t part_o = part / in_parts * plan.part_outs, part_i = part % in_parts * plan.part_ins;
          const FrequencyWeights w{branches.data(), int64_t(branches.size()), p.in_channels, p.out_channels, g.radius_h, i + part_i, std::min(plan.part_ins, ins - part_i), o + part_o,
                                   std::min(plan.part_outs, outs - part_o), false, scratches[one].halves, nullptr};
          gather_products(scratches[one], w, plan.step_ins, {x_planes + part_i, (spectra ? spectra : own) + part_o, x_plane, grad_plane, x_width, grad_width, tiles, row > 0});
          if (row + plan.rows >= g.all_rows) scratches[one].run_blocks(NASDET_FREQUENCY_KERNEL(frequency_weight_gradients), w);
        });
      }
    }
  sum_mix_gradients(p, branches);
}

void frequency_forward(const ConvProblem& p, const void* x, void* y) {
  const FrequencyPlan plan = FrequencyPlanner(p).forward();
  const Crew crew = crew_of(plan, padded_to(p.in_channels, frequency_costs().lanes), p.out_channels, 0);
  Scratch scratch(crew.bytes());
  convolve(p, plan, crew, static_cast<const float*>(x), static_cast<float*>(y), false, nullptr, scratch);
}

void frequency_backward(const ConvProblem& p, const void* x, const void* grad, void* dx) {
  bool wanted = false;
  for (const ConvBranch& b : p.branches) wanted |= b.weight_grad || b.mix_grad;
  const FrequencyBackwardPlan plan = FrequencyPlanner(p).backward();
  const FrequencyGeometry& g = plan.dw.g;
  const bool shared = plan.shared && wanted && dx;
  const int64_t out_padded = padded_to(p.out_channels, frequency_costs().lanes), plane = plan.dw.map_plane(out_padded);
  const size_t shared_elements = shared ? spectra_of(plan.dw, out_padded) : 0, held = Scratch::padded(shared_elements * 4);
  const Crew dx_crew = crew_of(plan.dx, out_padded, p.in_channels, held), dw_crew = crew_of(plan.dw, held);
  Scratch scratch(held + std::max(dx ? dx_crew.bytes() : 0, wanted ? dw_crew.bytes() : 0));
  float* const spectra = shared ? scratch.take<float>(shared_elements) : nullptr;
  if (shared) run_spectra(g, g.tiles(p, p.out_channels, false, 0, g.all_rows), {spectra, plane, out_padded, 0, g.planes() * plane * 4 >= kFrequencyCached}, static_cast<const float*>(grad), FrequencyForm::kConjugateFactor);
  const size_t mark = scratch.used();
  if (dx) convolve(p, plan.dx, dx_crew, static_cast<const float*>(grad), static_cast<float*>(dx), true, spectra, scratch);
  scratch.rewind(mark);
  if (wanted) weight_gradients(p, plan.dw, dw_crew, static_cast<const float*>(x), static_cast<const float*>(grad), spectra, scratch);
}

#else
const char* frequency_why_not(const ConvProblem&) { return "the frequency domain needs AVX2"; }
double frequency_seconds(const ConvProblem&, bool) { return 0; }
void frequency_forward(const ConvProblem&, const void*, void*) {}
void frequency_backward(const ConvProblem&, const void*, const void*, void*) {}
#endif

}  // namespace
}  // namespace nasdet
