// The gradients of the weights and of mix in the frequency domain: products of two spectra, back to taps.
#pragma once
#include "frequency_work.h"

namespace nasdet {
namespace {

// Branches with room for each block of inputs' part of the gradient of mix, in `parts`.
std::vector<FrequencyBranch> gradient_branches(const ConvProblem& p, const TapFold& fold, std::vector<float>& parts) {
  std::vector<FrequencyBranch> branches = frequency_branches(p, fold);
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
  int64_t step_elements;
  size_t shared;  // bytes of the spectra

  GradientCrew(const FrequencyGradientPlan& plan, size_t held)
      : sizes(plan.sizes()), ins(plan.ins), outs(plan.outs), part_ins(plan.part_ins), part_outs(plan.part_outs) {
    const int64_t most = nasdet::threads();
    for (int64_t* part : {&part_ins, &part_outs})
      while (most > 1 && count() < 2 * most && *part > kFrequencyBlock) *part = padded_to(*part / 2, kFrequencyBlock);
    parts = count(), threads = std::min(most, parts);
    step_elements = sizes.gradient_step(part_outs);
    shared = Scratch::padded(size_t(sizes.spectra(ins, block_of(ins))) * 4) +
             (held ? 0 : Scratch::padded(size_t(sizes.spectra(outs, block_of(outs))) * 4));
    while (kept = plan.rows < plan.g.all_rows ? parts : threads,
           threads > 1 && int64_t(held + bytes()) > scratch_limit())
      --threads;
  }
  int64_t count() const { return pieces_of(ins, part_ins) * pieces_of(outs, part_outs); }
  size_t bytes() const {
    return shared + size_t(kept) * Scratch::padded(size_t(sizes.folded(part_ins, part_outs)) * 4) +
           size_t(threads) * Scratch::padded(size_t(step_elements) * 4);
  }
};

// Products of the spectra of x and of the output's gradient over tiles, folded.
struct GradientProducts {
  const float *x, *grad;  // spectra, from the blocks of the first of the channels
  int64_t x_plane, x_block, grad_plane, grad_block, tiles;
  bool add;
};
void gather_products(const FrequencySizes& s, const FrequencyWeights& w, float* planes, const GradientProducts& m) {
  const int lanes = frequency_costs().lanes;
  const int64_t width = padded_to(w.outs, lanes), tile = s.g.tile, all = frequency_planes(tile);
  const int64_t step_plane = frequency_step_plane(lanes);
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
                                                            {step, planes, row, rows, m.add || step > 0});
    }
  }
}

// The gradients of the weights and of mix: spectra, products, and back to taps. `given`: spectra of all of the output's
// gradient, or null.
class WeightGradients {
 public:
  WeightGradients(const ConvProblem& p, const FrequencyGradientPlan& plan, const GradientCrew& crew, const float* given,
                  Scratch& scratch)
      : p_(p), plan_(plan), crew_(crew), given_(given), fold_(p), branches_(gradient_branches(p, fold_, mix_parts_)) {
    x_planes_ = scratch.take<float>(size_t(x_elements_));
    own_ = scratch.take<float>(given ? 0 : size_t(grad_elements_));
    const int64_t folded = sizes_.folded(crew.part_ins, crew.part_outs);
    for (int64_t i = 0; i < crew.kept; ++i) folded_.push_back(scratch.take<float>(size_t(folded)));
    for (int64_t i = 0; i < crew.threads; ++i) steps_.push_back(scratch.take<float>(size_t(crew.step_elements)));
    all_.branches = branches_.data();
    all_.branch_count = int64_t(branches_.size());
    all_.in_channels = p.in_channels;
    all_.out_channels = p.out_channels;
    all_.fold = fold_.of(plan.g.grid, ends_);
  }
  WeightGradients(const WeightGradients&) = delete;  // the weights point into it

  void run(const float* x, const float* grad) {
    for (int64_t o = 0; o < p_.out_channels; o += plan_.outs)
      for (int64_t i = 0; i < p_.in_channels; i += plan_.ins)
        for (int64_t row = 0; row < plan_.g.all_rows; row += plan_.rows) {
          load(x, grad, i, o, row);
          sum(i, o, row);
        }
    sum_mix_gradients(p_, branches_);
  }

 private:
  int64_t rows_from(int64_t row) const { return std::min(plan_.rows, plan_.g.all_rows - row); }
  int64_t ins_from(int64_t i) const { return std::min(plan_.ins, p_.in_channels - i); }
  int64_t outs_from(int64_t o) const { return std::min(plan_.outs, p_.out_channels - o); }

  // The spectra of rows of tiles from `row` on, where they are not the ones in hand.
  void load(const float* x, const float* grad, int64_t i, int64_t o, int64_t row) {
    const FrequencyGeometry& g = plan_.g;
    const int64_t lanes = frequency_costs().lanes;
    if (!given_ && (loaded_grad_[0] != o || loaded_grad_[1] != row))
      run_spectra(
          g, g.tiles(p_, p_.out_channels, true, row, rows_from(row)),
          {own_, grad_plane_, grad_block_, padded_to(outs_from(o), lanes), o, grad_elements_ * 4 >= kFrequencyCached},
          grad);
    if (loaded_x_[0] != i || loaded_x_[1] != row)
      run_spectra(
          g, g.tiles(p_, p_.in_channels, false, row, rows_from(row)),
          {x_planes_, x_plane_, x_block_, padded_to(ins_from(i), lanes), i, x_elements_ * 4 >= kFrequencyCached}, x);
    loaded_grad_[0] = o, loaded_grad_[1] = row, loaded_x_[0] = i, loaded_x_[1] = row;
  }

  // The products of what is in hand, part by part; after the last rows as gradients of taps.
  void sum(int64_t i, int64_t o, int64_t row) {
    const FrequencyGeometry& g = plan_.g;
    const int64_t ins = ins_from(i), outs = outs_from(o), tiles = rows_from(row) * g.columns;
    const int64_t in_parts = pieces_of(ins, crew_.part_ins);
    const bool goes = plan_.rows < g.all_rows;
    for_tasks(in_parts * pieces_of(outs, crew_.part_outs), crew_.threads, [&](int64_t one, int64_t part) {
      const int64_t part_o = part / in_parts * crew_.part_outs, part_i = part % in_parts * crew_.part_ins;
      const float* const x = x_planes_ + part_i / x_block_ * g.planes() * x_plane_;
      const float* const grad = (given_ ? given_ : own_) + part_o / grad_block_ * g.planes() * grad_plane_;
      FrequencyWeights w = all_;
      w.first_in = i + part_i;
      w.ins = std::min(crew_.part_ins, ins - part_i);
      w.first_out = o + part_o;
      w.outs = std::min(crew_.part_outs, outs - part_o);
      w.folded = folded_[size_t(goes ? part : one)];
      gather_products(sizes_, w, steps_[size_t(one)],
                      {x, grad, x_plane_, x_block_, grad_plane_, grad_block_, tiles, row > 0});
      if (row + plan_.rows >= g.all_rows) NASDET_FREQUENCY_KERNEL(frequency_weight_gradients)(g.tile, w);
    });
  }

  const ConvProblem& p_;
  const FrequencyGradientPlan& plan_;
  const GradientCrew& crew_;
  const float* const given_;
  const FrequencySizes sizes_ = plan_.sizes();
  const int64_t x_block_ = block_of(plan_.ins), grad_block_ = block_of(plan_.outs);
  const int64_t x_plane_ = sizes_.plane(x_block_), grad_plane_ = sizes_.plane(grad_block_);
  const int64_t x_elements_ = sizes_.spectra(plan_.ins, x_block_);
  const int64_t grad_elements_ = sizes_.spectra(plan_.outs, grad_block_);
  std::vector<float> mix_parts_;
  std::vector<int32_t> ends_;
  const TapFold fold_;
  const std::vector<FrequencyBranch> branches_;
  FrequencyWeights all_{};
  float *x_planes_, *own_;
  std::vector<float*> folded_, steps_;
  int64_t loaded_x_[2] = {-1, -1}, loaded_grad_[2] = {-1, -1};  // first channel and row
};

}  // namespace
}  // namespace nasdet
