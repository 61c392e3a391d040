// What the launchers of the direct forms share: weights into panels, and sums of panels to the gradients of the weights.
#pragma once
#include <cstring>

#include "conv_direct_plan.h"
#include "nasdet/isa.h"
#include "scratch.h"
#include "tasks.h"

namespace nasdet {
namespace {

inline int64_t stored_bytes(int storage) { return storage == 0 ? 4 : storage == 1 ? 8 : 2; }
inline int64_t arithmetic_bytes(int storage) { return storage == 1 ? 8 : 4; }

// The groups of a panel as panels of their own: body(panel, corner). `fan` source and `width` target channels each, and
// `channels` source channels of the panel.
template <class Body>
void for_groups(const ConvProblem& p, const ConvPanel& panel, ConvForm form, bool shared, int64_t fan, int64_t width,
                int64_t channels, const Body& body) {
  const int64_t lanes = NASDET_KERNEL(conv_direct_width)(p.storage, form, panel.width);
  const int64_t step = shared ? width : panel.width;
  for (int64_t lane = 0, channel = 0; lane < panel.width; lane += step, channel += fan)
    body(ConvPanel{panel.target + lane, step, panel.source + channel, panel.weights},
         ConvCorner{channel, channels, lane, lanes});
}

inline void pack_panel(const ConvProblem& p, const ConvFamily& family, const ConvPanel& panel, int64_t bytes,
                       bool transposed) {
  const int64_t fan = p.in_channels / p.groups, width = p.out_channels / p.groups, all = int64_t(p.kernel) * p.kernel;
  std::memset(panel.weights, 0, size_t(bytes));
  // One channel in, one out: lanes are channels of the output, which are those of the input.
  const bool by_input = transposed && family.form != ConvForm::depthwise;
  const int64_t sources = by_input ? width : fan, targets = by_input ? fan : width;
  for (const ConvSource& source : family.sources) {
    const int64_t outs = p.groups == 1 ? source.part->last - source.part->first : width;
    const int64_t channels = p.groups == 1 ? (by_input ? outs : fan) : family.shared * sources;
    for (size_t b = 0; b < source.part->branches.size(); ++b) {
      const ConvBranch& branch = *source.part->branches[b];
      for_groups(p, panel, family.form, family.shared > 1, sources, targets, channels,
                 [&](const ConvPanel& group, const ConvCorner& corner) {
                   const ConvPack job{p.storage,     family.form,
                                      branch.weight, branch.mix,
                                      branch.first,  fan,
                                      all,           source.place[b].data(),
                                      source.taps,   source.row,
                                      by_input,      p.groups == 1 ? source.part->first : group.source,
                                      outs,          p.groups == 1 ? group.target : group.target % fan,
                                      corner};
                   NASDET_KERNEL(conv_direct_pack)(job, group);
                 });
    }
  }
  if (has_pairs(family.form)) NASDET_KERNEL(conv_direct_pair_rows)(panel, family.rows, family.form);
}

inline int64_t panel_bytes(const ConvProblem& p, const ConvFamily& family, const ConvPanel& panel) {
  return int64_t(
      Scratch::padded(size_t(family.rows * NASDET_KERNEL(conv_direct_width)(p.storage, family.form, panel.width) *
                             arithmetic_bytes(p.storage))));
}

// Of packed panels: the largest, and all together.
struct PanelBytes {
  int64_t most = 0, all = 0;
  PanelBytes(const ConvProblem& p, const std::vector<ConvFamily>& families) {
    for (const ConvFamily& f : families)
      for (const ConvPanel& panel : f.panels) {
        const int64_t bytes = panel_bytes(p, f, panel);
        most = std::max(most, bytes), all += bytes;
      }
  }
};

// Packs the panels of all families, as many at a time as `held` bytes at `packed` take: add(family, first, last) notes some that
// are ready, flush() works on those noted; after each family if `apart`.
template <class Add, class Flush>
void for_packed_panels(const ConvProblem& p, std::vector<ConvFamily>& families, char* packed, int64_t held,
                       bool transposed, bool apart, const Add& add, const Flush& flush) {
  int64_t used = 0;
  for (ConvFamily& f : families) {
    const int64_t count = int64_t(f.panels.size());
    for (int64_t first = 0, last; first < count; first = last) {
      for (last = first; last < count; ++last) {
        const int64_t bytes = panel_bytes(p, f, f.panels[size_t(last)]);
        if (used + bytes > held) break;
        f.panels[size_t(last)].weights = packed + used;
        used += bytes;
      }
      for_tasks(last - first, threads(), [&](int64_t, int64_t i) {
        ConvPanel& panel = f.panels[size_t(first + i)];
        pack_panel(p, f, panel, panel_bytes(p, f, panel), transposed);
      });
      if (last > first) add(f, first, last);
      if (last < count || apart) flush(), used = 0;
    }
  }
  if (used > 0) flush();
}

// Some panels of one part, and a range of input channels: a task of the weight gradient.
struct GradUnit {
  const ConvPart* part;
  const std::vector<ConvSpan>* taps;
  ConvForm form;
  std::vector<ConvPanel> panels;
  int64_t first, last, range;  // range: its number among those of the panels
  int64_t bytes;
  int64_t shared = 1;  // groups that share a panel
};

// Sums to the gradients of the branches. `mixes`: [range][branch][out_channels] parts of mix_grad.
inline void unfold_unit(const ConvProblem& p, const GradUnit& unit, char* mixes) {
  const int64_t branches = int64_t(p.branches.size()), size = arithmetic_bytes(p.storage);
  const int64_t fan = p.in_channels / p.groups, channels = unit.shared * (unit.last - unit.first);
  for (const ConvPanel& panel : unit.panels)
    for (size_t b = 0; b < unit.part->branches.size(); ++b) {
      const ConvBranch& branch = *unit.part->branches[b];
      if (!branch.weight_grad && !branch.mix_grad) continue;
      char* const mix =
          mixes + ((unit.range * branches + (&branch - p.branches.data())) * p.out_channels + branch.first) * size;
      for_groups(p, panel, unit.form, unit.shared > 1, fan, p.out_channels / p.groups, channels,
                 [&](const ConvPanel& group, const ConvCorner& corner) {
                   const ConvUnfold job{p.storage,
                                        branch.weight,
                                        branch.mix,
                                        branch.weight_grad,
                                        branch.mix_grad ? mix : nullptr,
                                        branch.first,
                                        fan,
                                        int64_t(p.kernel) * p.kernel,
                                        unit.part->place[b].data(),
                                        unit.first,
                                        unit.last,
                                        corner};
                   NASDET_KERNEL(conv_direct_unfold)(job, group);
                 });
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
