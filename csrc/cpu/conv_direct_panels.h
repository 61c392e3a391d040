// What the launchers of the direct forms share: weights into panels, and sums of panels to the gradients of the weights.
#pragma once
#include <cstring>

#include "conv_direct_plan.h"
#include "nasdet/isa.h"

namespace nasdet {
namespace {

inline int64_t stored_bytes(int storage) { return storage == 0 ? 4 : storage == 1 ? 8 : 2; }
inline int64_t arithmetic_bytes(int storage) { return storage == 1 ? 8 : 4; }

inline void pack_panel(const ConvProblem& p, const ConvFamily& family, const ConvPanel& panel, int64_t bytes, bool transposed) {
  const int64_t fan = p.in_channels / p.groups, width = p.out_channels / p.groups, all = int64_t(p.kernel) * p.kernel;
  std::memset(panel.weights, 0, size_t(bytes));
  // One channel in, one out: lanes are channels of the output, which are those of the input.
  const bool by_input = transposed && family.form != ConvForm::depthwise;
  for (const ConvSource& source : family.sources) {
    const int64_t out = p.groups == 1 ? source.part->first : panel.source, outs = p.groups == 1 ? source.part->last - out : width;
    for (size_t b = 0; b < source.part->branches.size(); ++b) {
      const ConvBranch& branch = *source.part->branches[b];
      const ConvPack job{p.storage, family.form, branch.weight, branch.mix, branch.first, fan, all, source.place[b].data(), source.taps, source.row, by_input, out, outs,
                         p.groups == 1 ? panel.target : panel.target % fan};
      NASDET_KERNEL(conv_direct_pack)(job, panel);
    }
  }
  if (has_pairs(family.form)) NASDET_KERNEL(conv_direct_pair_rows)(panel, family.rows, family.form);
}

// Some panels of one part, and a range of input channels: a task of the weight gradient.
struct GradUnit {
  const ConvPart* part;
  const std::vector<ConvSpan>* taps;
  ConvForm form;
  std::vector<ConvPanel> panels;
  int64_t first, last, range;  // range: its number among those of the panels
  int64_t bytes;
};

// Sums to the gradients of the branches. `mixes`: [range][branch][out_channels] parts of mix_grad.
inline void unfold_unit(const ConvProblem& p, const GradUnit& unit, char* mixes) {
  const int64_t branches = int64_t(p.branches.size()), size = arithmetic_bytes(p.storage);
  for (const ConvPanel& panel : unit.panels)
    for (size_t b = 0; b < unit.part->branches.size(); ++b) {
      const ConvBranch& branch = *unit.part->branches[b];
      if (!branch.weight_grad && !branch.mix_grad) continue;
      char* const mix = mixes + ((unit.range * branches + (&branch - p.branches.data())) * p.out_channels + branch.first) * size;
      const ConvUnfold job{p.storage, branch.weight, branch.mix, branch.weight_grad, branch.mix_grad ? mix : nullptr, branch.first, p.in_channels / p.groups,
                           int64_t(p.kernel) * p.kernel, unit.part->place[b].data(), unit.first, unit.last};
      NASDET_KERNEL(conv_direct_unfold)(job, panel, unit.form);
    }
}

template <class T> void sum_mixes(const ConvProblem& p, const T* parts, int64_t ranges) {
  const int64_t branches = int64_t(p.branches.size());
  for (int64_t b = 0; b < branches; ++b) {
    const ConvBranch& branch = p.branches[size_t(b)];
    for (int64_t o = branch.first; branch.mix_grad && o < branch.last; ++o) {
      double sum = 0;
      for (int64_t r = 0; r < ranges; ++r) sum += double(parts[(r * branches + b) * p.out_channels + o]);
      static_cast<T*>(branch.mix_grad)[o - branch.first] = T(sum);
    }
  }
}

}  // namespace
}  // namespace nasdet
