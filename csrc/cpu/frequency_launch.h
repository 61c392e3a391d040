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

// What the weights of a chunk need on their way, on so many threads; the plan must outlive it.
struct WeightScratch {
  const FrequencySizes sizes;
  int64_t folded_elements, step_plane;
  Slots grids, steps;
  float *folded = nullptr, *grid_data = nullptr, *step_data = nullptr;

  WeightScratch(const FrequencySizes& s, int64_t ins, int64_t outs, int64_t step_elements, int64_t threads)
      : sizes(s), folded_elements(s.folded(ins, outs)), step_plane(s.step_plane(outs)), grids(vectors_of(ins) * vectors_of(outs), threads, 2 * s.g.grid * s.g.grid * frequency_costs().lanes * frequency_costs().lanes),
        steps(frequency_steps(s.g.tile), threads, padded_to(step_elements, 16)) {}
  size_t bytes() const { return Scratch::padded(size_t(folded_elements) * 4) + Scratch::padded(grids.elements() * 4) + Scratch::padded(steps.elements() * 4); }
  void take(Scratch& scratch) {
    folded = scratch.take<float>(size_t(folded_elements));
    grid_data = scratch.take<float>(grids.elements());
    step_data = scratch.take<float>(steps.elements());
  }

  // The weights folded, or with the other kernel back.
  template <class Kernel> void run_blocks(Kernel kernel, const FrequencyWeights& w) const {
    grids.run(grid_data, vectors_of(w.outs) * vectors_of(w.ins), [&](float* data, int64_t begin, int64_t end) {
      FrequencyWeights own = w;
      own.grids = data;
      kernel(sizes.g.tile, sizes.g.grid, own, begin, end);
    });
  }

  // f(step, its scratch) for all steps.
  template <class F> void run_steps(const F& f) const {
    steps.run(step_data, frequency_steps(sizes.g.tile), [&](float* data, int64_t begin, int64_t end) {
      for (int64_t step = begin; step < end; ++step) f(int(step), data);
    });
  }
};

void run_spectra(const FrequencyGeometry& g, const FrequencyTiles& tiles, const FrequencyPlanes& planes, const float* map) {
  const auto kernel = NASDET_FREQUENCY_KERNEL(frequency_spectra);
  for_ranges(tiles.tiles * vectors_of(planes.channels), threads(), [&](int64_t, int64_t begin, int64_t end) { kernel(g.tile, tiles, planes, map, begin, end); });
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
  const float* from;  // spectra of the map, from the block of the first of the channels
  float* to;
  int64_t from_plane, from_block, to_plane, tiles;
  bool add;
};
void multiply_by_weights(const WeightScratch& s, const FrequencyWeights& w, const Products& m) {
  const int64_t depth = w.transposed ? w.outs : w.ins, width = padded_to(w.transposed ? w.ins : w.outs, frequency_costs().lanes), tile = s.sizes.g.tile;
  s.run_blocks(NASDET_FREQUENCY_KERNEL(frequency_weights), w);
  s.run_steps([&](int step, float* planes) {
    const int64_t first = step * frequency_step_planes(tile);
    for (int64_t row = 0; row < depth; row += m.from_block) {
      const int64_t rows = std::min(m.from_block, depth - row);
      const float* const from = m.from + row / m.from_block * frequency_planes(tile) * m.from_plane;
      NASDET_FREQUENCY_KERNEL(frequency_weight_planes)(s.sizes.g.tile, s.sizes.g.grid, w, {step, planes, s.step_plane, row, rows, false});
      NASDET_FREQUENCY_KERNEL(frequency_multiply)
      ({from + first * m.from_plane, planes, m.to + first * m.to_plane, m.from_plane, s.step_plane, m.to_plane, m.from_block, width, m.tiles, width, rows, frequency_step_complex(tile, step),
        frequency_step_real(tile, step), m.add || row > 0, row == 0, planes + frequency_step_planes(tile) * s.step_plane});
    }
  });
}

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

WeightScratch weight_scratch(const FrequencyPlan& plan, int64_t threads) { return {plan.sizes(), plan.ins, plan.outs, plan.sizes().step(plan.outs), threads}; }

// `held`: bytes of the spectra of all of the map, if they are there.
Crew crew_of(const FrequencyPlan& plan, int64_t in_padded, int64_t out, size_t held) {
  const FrequencySizes s = plan.sizes();
  return {pieces_of(out, plan.outs), held, held ? 0 : Scratch::padded(size_t(s.spectra(in_padded, block_of(in_padded))) * 4),
          [&](int64_t threads) { return Scratch::padded(size_t(s.spectra(plan.outs, plan.outs)) * 4) + weight_scratch(plan, threads).bytes(); }};
}

// `to` = the convolution of `from`; for the gradient of the input, with the kernels turned round and the channels swapped.
// `spectra` of all of `from`, if they are there.
void convolve(const ConvProblem& p, const FrequencyPlan& plan, const Crew& crew, const float* from, float* to, bool gradient, const float* spectra, Scratch& scratch) {
  const int64_t in = gradient ? p.out_channels : p.in_channels, out = gradient ? p.in_channels : p.out_channels;
  const int64_t lanes = frequency_costs().lanes, in_padded = padded_to(in, lanes);
  const FrequencyGeometry& g = plan.g;
  const FrequencySizes sizes = plan.sizes();
  const std::vector<FrequencyBranch> branches = frequency_branches(p);
  const TapFold fold(p);
  std::vector<int32_t> ends;
  const int64_t block = block_of(in_padded), from_plane = sizes.plane(block), to_plane = sizes.plane(plan.outs), from_elements = sizes.spectra(in_padded, block);
  float* const own = scratch.take<float>(spectra ? 0 : size_t(from_elements));
  std::vector<float*> results;
  for (int64_t one = 0; one < crew.size; ++one) results.push_back(scratch.take<float>(size_t(sizes.spectra(plan.outs, plan.outs))));
  std::vector<WeightScratch> scratches(size_t(crew.size), weight_scratch(plan, crew.threads));
  for (WeightScratch& one : scratches) one.take(scratch);
  FrequencyWeights all{branches.data(), int64_t(branches.size()), p.in_channels, p.out_channels, fold.of(g.grid, ends), 0, 0, 0, 0, gradient, nullptr, nullptr};
  if (gradient) clear_map(to, p.images * p.height * p.width * out);
  for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
    const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
    if (!spectra) run_spectra(g, g.tiles(p, in, !gradient, row, rows), {own, from_plane, block, in_padded, 0, from_elements * 4 >= kFrequencyCached}, from);
    crew.run(pieces_of(out, plan.outs), [&](size_t one, int64_t chunk) {
      const int64_t o = chunk * plan.outs, outs = std::min(plan.outs, out - o);
      for (int64_t i = 0; i < in; i += plan.ins) {
        FrequencyWeights w = all;
        w.first_in = i, w.ins = std::min(plan.ins, in - i), w.first_out = o, w.outs = outs, w.folded = scratches[one].folded;
        if (gradient) std::swap(w.first_in, w.first_out), std::swap(w.ins, w.outs);
        multiply_by_weights(scratches[one], w, {(spectra ? spectra : own) + i / block * g.planes() * from_plane, results[one], from_plane, block, to_plane, tiles, i > 0});
      }
      const FrequencyPlanes result{results[one], to_plane, padded_to(outs, lanes), padded_to(outs, lanes), o, false};
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

// How the gradient of the weights is dealt out: in parts, each with all its sums over tiles and frequencies by one thread.
// Where the sums go on over several goes, every part keeps its own folded weights, else every thread has one.
struct GradientCrew {
  const FrequencySizes sizes;
  int64_t ins, outs, part_ins, part_outs, parts, threads, kept;
  int64_t grid_elements, step_elements;
  size_t shared;  // bytes of the spectra

  GradientCrew(const FrequencyGradientPlan& plan, size_t held) : sizes(plan.sizes()), ins(plan.ins), outs(plan.outs), part_ins(plan.part_ins), part_outs(plan.part_outs) {
    const int64_t most = nasdet::threads();
    for (int64_t* part : {&part_ins, &part_outs})
      while (most > 1 && count() < 2 * most && *part > kFrequencyBlock) *part = padded_to(*part / 2, kFrequencyBlock);
    parts = count(), threads = std::min(most, parts);
    const int64_t lanes = frequency_costs().lanes, grid = sizes.g.grid;
    grid_elements = 2 * lanes * lanes * grid * grid, step_elements = sizes.gradient_step(part_outs);
    shared = Scratch::padded(size_t(sizes.spectra(ins, block_of(ins))) * 4) + (held ? 0 : Scratch::padded(size_t(sizes.spectra(outs, block_of(outs))) * 4));
    while (kept = plan.rows < plan.g.all_rows ? parts : threads, threads > 1 && int64_t(held + bytes()) > scratch_limit()) --threads;
  }
  int64_t count() const { return pieces_of(ins, part_ins) * pieces_of(outs, part_outs); }
  size_t bytes() const {
    return shared + size_t(kept) * Scratch::padded(size_t(sizes.folded(part_ins, part_outs)) * 4) + size_t(threads) * (Scratch::padded(size_t(grid_elements) * 4) + Scratch::padded(size_t(step_elements) * 4));
  }
};

// Products of the spectra of x and of the output's gradient over tiles, folded.
struct GradientProducts {
  const float *x, *grad;  // spectra, from the blocks of the first of the channels
  int64_t x_plane, x_block, grad_plane, grad_block, tiles;
  bool add;
};
void gather_products(const FrequencySizes& s, const FrequencyWeights& w, float* planes, int64_t step_plane, const GradientProducts& m) {
  const int64_t width = padded_to(w.outs, frequency_costs().lanes), tile = s.g.tile, all = frequency_planes(tile);
  for (int step = 0; step < frequency_steps(tile); ++step) {
    const int64_t first = step * frequency_step_planes(tile);
    for (int64_t row = 0; row < w.ins; row += m.x_block) {
      const int64_t rows = std::min(m.x_block, w.ins - row);
      NASDET_FREQUENCY_KERNEL(frequency_multiply_gradients)
      ({m.x + (row / m.x_block * all + first) * m.x_plane, m.grad + first * m.grad_plane, planes, m.x_plane, m.grad_plane, all * m.grad_plane, step_plane, m.x_block, m.grad_block, rows, width, m.tiles,
        frequency_step_complex(tile, step), frequency_step_real(tile, step), planes + frequency_step_planes(tile) * step_plane});
      NASDET_FREQUENCY_KERNEL(frequency_weight_planes_back)(s.g.tile, s.g.grid, w, {step, planes, step_plane, row, rows, m.add || step > 0});
    }
  }
}

// The products of the spectra of x and of the gradient, back to taps. `spectra` of all of the gradient, if they are there.
void weight_gradients(const ConvProblem& p, const FrequencyGradientPlan& plan, const GradientCrew& crew, const float* x, const float* grad, const float* spectra, Scratch& scratch) {
  const FrequencyGeometry& g = plan.g;
  const FrequencySizes sizes = plan.sizes();
  const int64_t lanes = frequency_costs().lanes, x_block = block_of(plan.ins), grad_block = block_of(plan.outs), x_plane = sizes.plane(x_block), grad_plane = sizes.plane(grad_block);
  const int64_t x_elements = sizes.spectra(plan.ins, x_block), grad_elements = sizes.spectra(plan.outs, grad_block), step_plane = sizes.step_plane(crew.part_outs);
  const TapFold fold(p);
  std::vector<float> mix_parts;
  std::vector<int32_t> ends;
  const std::vector<FrequencyBranch> branches = gradient_branches(p, mix_parts);
  float *const x_planes = scratch.take<float>(size_t(x_elements)), *const own = scratch.take<float>(spectra ? 0 : size_t(grad_elements));
  std::vector<float*> folded, grids, steps;
  for (int64_t i = 0; i < crew.kept; ++i) folded.push_back(scratch.take<float>(size_t(sizes.folded(crew.part_ins, crew.part_outs))));
  for (int64_t i = 0; i < crew.threads; ++i) grids.push_back(scratch.take<float>(size_t(crew.grid_elements))), steps.push_back(scratch.take<float>(size_t(crew.step_elements)));
  const FrequencyWeights all{branches.data(), int64_t(branches.size()), p.in_channels, p.out_channels, fold.of(g.grid, ends), 0, 0, 0, 0, false, nullptr, nullptr};
  const bool goes = plan.rows < g.all_rows;
  int64_t loaded_x[2] = {-1, -1}, loaded_grad[2] = {-1, -1};  // first channel and row
  for (int64_t o = 0; o < p.out_channels; o += plan.outs)
    for (int64_t i = 0; i < p.in_channels; i += plan.ins) {
      const int64_t outs = std::min(plan.outs, p.out_channels - o), ins = std::min(plan.ins, p.in_channels - i), in_parts = pieces_of(ins, crew.part_ins);
      for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
        const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
        if (!spectra && (loaded_grad[0] != o || loaded_grad[1] != row))
          run_spectra(g, g.tiles(p, p.out_channels, false, row, rows), {own, grad_plane, grad_block, padded_to(outs, lanes), o, grad_elements * 4 >= kFrequencyCached}, grad);
        if (loaded_x[0] != i || loaded_x[1] != row)
          run_spectra(g, g.tiles(p, p.in_channels, true, row, rows), {x_planes, x_plane, x_block, padded_to(ins, lanes), i, x_elements * 4 >= kFrequencyCached}, x);
        loaded_grad[0] = o, loaded_grad[1] = row, loaded_x[0] = i, loaded_x[1] = row;
        for_tasks(in_parts * pieces_of(outs, crew.part_outs), crew.threads, [&](int64_t one, int64_t part) {
          const int64_t part_o = part / in_parts * crew.part_outs, part_i = part % in_parts * crew.part_ins;
          FrequencyWeights w = all;
          w.first_in = i + part_i, w.ins = std::min(crew.part_ins, ins - part_i), w.first_out = o + part_o, w.outs = std::min(crew.part_outs, outs - part_o);
          w.folded = folded[size_t(goes ? part : one)], w.grids = grids[size_t(one)];
          gather_products(sizes, w, steps[size_t(one)], step_plane,
                          {x_planes + part_i / x_block * g.planes() * x_plane, (spectra ? spectra : own) + part_o / grad_block * g.planes() * grad_plane, x_plane, x_block, grad_plane, grad_block, tiles, row > 0});
          if (row + plan.rows >= g.all_rows) NASDET_FREQUENCY_KERNEL(frequency_weight_gradients)(g.tile, g.grid, w, 0, vectors_of(w.outs) * vectors_of(w.ins));
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
  const FrequencySizes sizes = plan.dw.sizes();
  const bool shared = plan.shared && wanted && dx;
  const int64_t out_padded = padded_to(p.out_channels, frequency_costs().lanes), block = block_of(out_padded), plane = sizes.plane(block);
  const size_t elements = shared ? size_t(sizes.spectra(out_padded, block)) : 0, held = Scratch::padded(elements * 4);
  const Crew dx_crew = crew_of(plan.dx, out_padded, p.in_channels, held);
  const GradientCrew dw_crew(plan.dw, held);
  Scratch scratch(held + std::max(dx ? dx_crew.bytes() : 0, wanted ? dw_crew.bytes() : 0));
  float* const spectra = shared ? scratch.take<float>(elements) : nullptr;
  if (shared) run_spectra(g, g.tiles(p, p.out_channels, false, 0, g.all_rows), {spectra, plane, block, out_padded, 0, elements * 4 >= size_t(kFrequencyCached)}, static_cast<const float*>(grad));
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
