// The gradients of the weights and of mix in the frequency domain: products of two spectra, back to taps.
#pragma once
#include "frequency_work.h"

namespace nasdet {
namespace {

// Branches with room for each block of inputs' part of the gradient of mix, in `parts`.
std::vector<FrequencyBranch> gradient_branches(const ConvProblem& p, std::vector<float>& parts) {
  std::vector<FrequencyBranch> branches = frequency_branches(p);
  const int64_t in_vectors = vectors_of(p.in_channels);
  int64_t count = 0;
  for (const ConvBranch& b : p.branches) count += b.mix_grad ? in_vectors * (b.last - b.first) : 0;
  parts.resize(size_t(count));
  count = 0;
  for (size_t b = 0; b < branches.size(); ++b)
    if (p.branches[b].mix_grad)
      branches[b].mix_grad_part = parts.data() + count, count += in_vectors * (branches[b].last - branches[b].first);
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

  GradientCrew(const FrequencyGradientPlan& plan, size_t held)
      : sizes(plan.sizes()), ins(plan.ins), outs(plan.outs), part_ins(plan.part_ins), part_outs(plan.part_outs) {
    const int64_t most = nasdet::threads();
    for (int64_t* part : {&part_ins, &part_outs})
      while (most > 1 && count() < 2 * most && *part > kFrequencyBlock) *part = padded_to(*part / 2, kFrequencyBlock);
    parts = count(), threads = std::min(most, parts);
    const int64_t lanes = frequency_costs().lanes, grid = sizes.g.grid;
    grid_elements = 2 * lanes * lanes * grid * grid, step_elements = sizes.gradient_step(part_outs);
    shared = Scratch::padded(size_t(sizes.spectra(ins, block_of(ins))) * 4) +
             (held ? 0 : Scratch::padded(size_t(sizes.spectra(outs, block_of(outs))) * 4));
    while (kept = plan.rows < plan.g.all_rows ? parts : threads,
           threads > 1 && int64_t(held + bytes()) > scratch_limit())
      --threads;
  }
  int64_t count() const { return pieces_of(ins, part_ins) * pieces_of(outs, part_outs); }
  size_t bytes() const {
    return shared + size_t(kept) * Scratch::padded(size_t(sizes.folded(part_ins, part_outs)) * 4) +
           size_t(threads) * (Scratch::padded(size_t(grid_elements) * 4) + Scratch::padded(size_t(step_elements) * 4));
  }
};

// Products of the spectra of x and of the output's gradient over tiles, folded.
struct GradientProducts {
  const float *x, *grad;  // spectra, from the blocks of the first of the channels
  int64_t x_plane, x_block, grad_plane, grad_block, tiles;
  bool add;
};
void gather_products(const FrequencySizes& s, const FrequencyWeights& w, float* planes, int64_t step_plane,
                     const GradientProducts& m) {
  const int64_t width = padded_to(w.outs, frequency_costs().lanes), tile = s.g.tile, all = frequency_planes(tile);
  for (int step = 0; step < frequency_steps(tile); ++step) {
    const int64_t first = step * frequency_step_planes(tile);
    for (int64_t row = 0; row < w.ins; row += m.x_block) {
      const int64_t rows = std::min(m.x_block, w.ins - row);
      NASDET_FREQUENCY_KERNEL(frequency_multiply_gradients)
      ({m.x + (row / m.x_block * all + first) * m.x_plane, m.grad + first * m.grad_plane, planes, m.x_plane,
        m.grad_plane, all * m.grad_plane, step_plane, m.x_block, m.grad_block, rows, width, m.tiles,
        frequency_step_complex(tile, step), frequency_step_real(tile, step),
        planes + frequency_step_planes(tile) * step_plane});
      NASDET_FREQUENCY_KERNEL(frequency_weight_planes_back)(s.g.tile, s.g.grid, w,
                                                            {step, planes, step_plane, row, rows, m.add || step > 0});
    }
  }
}

// The products of the spectra of x and of the gradient, back to taps. `spectra` of all of the gradient, if they are there.
void weight_gradients(const ConvProblem& p, const FrequencyGradientPlan& plan, const GradientCrew& crew, const float* x,
                      const float* grad, const float* spectra, Scratch& scratch) {
  const FrequencyGeometry& g = plan.g;
  const FrequencySizes sizes = plan.sizes();
  const int64_t lanes = frequency_costs().lanes;
  const int64_t x_block = block_of(plan.ins);
  const int64_t grad_block = block_of(plan.outs);
  const int64_t x_plane = sizes.plane(x_block);
  const int64_t grad_plane = sizes.plane(grad_block);
  const int64_t x_elements = sizes.spectra(plan.ins, x_block);
  const int64_t grad_elements = sizes.spectra(plan.outs, grad_block);
  const int64_t step_plane = sizes.step_plane(crew.part_outs);
  const TapFold fold(p);
  std::vector<float> mix_parts;
  std::vector<int32_t> ends;
  const std::vector<FrequencyBranch> branches = gradient_branches(p, mix_parts);
  float* const x_planes = scratch.take<float>(size_t(x_elements));
  float* const own = scratch.take<float>(spectra ? 0 : size_t(grad_elements));
  std::vector<float*> folded, grids, steps;
  for (int64_t i = 0; i < crew.kept; ++i)
    folded.push_back(scratch.take<float>(size_t(sizes.folded(crew.part_ins, crew.part_outs))));
  for (int64_t i = 0; i < crew.threads; ++i)
    grids.push_back(scratch.take<float>(size_t(crew.grid_elements))),
        steps.push_back(scratch.take<float>(size_t(crew.step_elements)));
  const FrequencyWeights all{branches.data(),
                             int64_t(branches.size()),
                             p.in_channels,
                             p.out_channels,
                             fold.of(g.grid, ends),
                             0,
                             0,
                             0,
                             0,
                             false,
                             nullptr,
                             nullptr};
  const bool goes = plan.rows < g.all_rows;
  int64_t loaded_x[2] = {-1, -1}, loaded_grad[2] = {-1, -1};  // first channel and row
  for (int64_t o = 0; o < p.out_channels; o += plan.outs)
    for (int64_t i = 0; i < p.in_channels; i += plan.ins) {
      const int64_t outs = std::min(plan.outs, p.out_channels - o);
      const int64_t ins = std::min(plan.ins, p.in_channels - i);
      const int64_t in_parts = pieces_of(ins, crew.part_ins);
      for (int64_t row = 0; row < g.all_rows; row += plan.rows) {
        const int64_t rows = std::min(plan.rows, g.all_rows - row), tiles = rows * g.columns;
        if (!spectra && (loaded_grad[0] != o || loaded_grad[1] != row))
          run_spectra(g, g.tiles(p, p.out_channels, false, row, rows),
                      {own, grad_plane, grad_block, padded_to(outs, lanes), o, grad_elements * 4 >= kFrequencyCached},
                      grad);
        if (loaded_x[0] != i || loaded_x[1] != row)
          run_spectra(g, g.tiles(p, p.in_channels, true, row, rows),
                      {x_planes, x_plane, x_block, padded_to(ins, lanes), i, x_elements * 4 >= kFrequencyCached}, x);
        loaded_grad[0] = o, loaded_grad[1] = row, loaded_x[0] = i, loaded_x[1] = row;
        for_tasks(in_parts * pieces_of(outs, crew.part_outs), crew.threads, [&](int64_t one, int64_t part) {
          const int64_t part_o = part / in_parts * crew.part_outs, part_i = part % in_parts * crew.part_ins;
          FrequencyWeights w = all;
          w.first_in = i + part_i;
          w.ins = std::min(crew.part_ins, ins - part_i);
          w.first_out = o + part_o;
          w.outs = std::min(crew.part_outs, outs - part_o);
          w.folded = folded[size_t(goes ? part : one)], w.grids = grids[size_t(one)];
          gather_products(sizes, w, steps[size_t(one)], step_plane,
                          {x_planes + part_i / x_block * g.planes() * x_plane,
                           (spectra ? spectra : own) + part_o / grad_block * g.planes() * grad_plane, x_plane, x_block,
                           grad_plane, grad_block, tiles, row > 0});
          if (row + plan.rows >= g.all_rows)
            NASDET_FREQUENCY_KERNEL(frequency_weight_gradients)(g.tile, g.grid, w, 0,
                                                                vectors_of(w.outs) * vectors_of(w.ins));
        });
      }
    }
  sum_mix_gradients(p, branches);
}

}  // namespace
}  // namespace nasdet
