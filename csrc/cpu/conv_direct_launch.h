// The launchers of the direct convolution: scratch, the order of the work, the tasks of the threads.
#pragma once
#include <cstring>

#include "conv_amx_grad_launch.h"
#include "conv_direct_panels.h"
#include "nasdet/checks.h"
#include "scratch.h"
#include "tasks.h"

namespace nasdet {
namespace {

constexpr int64_t kBandPixels = 384, kGroupsBandPixels = 96;  // of a task; with convolution groups

inline const char* direct_why_not(const ConvProblem& p) {
  for (const ConvBranch& b : p.branches)
    if (p.groups > 1 && (b.first % (p.out_channels / p.groups) || b.last % (p.out_channels / p.groups)))
      return "a branch cuts a convolution group";
  return nullptr;
}

// [first, last) in as many runs as tasks: panels of up to kTaskChannels channels that read near ones.
inline std::vector<std::pair<int64_t, int64_t>> panel_tasks(const std::vector<ConvPanel>& panels, int64_t first,
                                                            int64_t last, int64_t reach) {
  std::vector<std::pair<int64_t, int64_t>> tasks;
  for (int64_t begin = first, end; begin < last; begin = end) {
    int64_t width = panels[size_t(begin)].width;
    for (end = begin + 1; end < last; ++end) {
      width += panels[size_t(end)].width;
      if (width > kTaskChannels || panels[size_t(end)].source - panels[size_t(begin)].source > reach) break;
    }
    tasks.push_back({begin, end});
  }
  return tasks;
}

// Panels [from, to) of a family.
struct ConvWork {
  const ConvFamily* family;
  int64_t from, to;
};

// All target pixels of the panels. With convolution groups weights are few and panels read their own channels: a band of
// pixels is then done for all panels, while its pages are at hand. Else the pixels of all bands are done for a panel.
inline void run_work(const ConvProblem& p, const std::vector<ConvWork>& work, const ConvMap& source,
                     const ConvMap& target, const void* zeros) {
  const auto pixels = [&](const ConvWork& w) { return p.images * w.family->lattice.rows * w.family->lattice.columns; };
  const int64_t step = p.groups > 1 ? kGroupsBandPixels : kBandPixels;
  int64_t bands = 0;
  for (const ConvWork& w : work) bands = std::max(bands, (pixels(w) + step - 1) / step);
  const int64_t tasks = int64_t(work.size());
  for_ranges(bands * tasks, threads(), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ConvWork& w = work[size_t(p.groups > 1 ? i % tasks : i / bands)];
      const ConvFamily& f = *w.family;
      const int64_t band = (p.groups > 1 ? i / tasks : i % bands) * step;
      if (band >= pixels(w)) continue;
      const ConvTiles job{p.storage,      f.form,    source,         target,
                          zeros,          f.lattice, f.spans.data(), int64_t(f.spans.size()),
                          f.panels.data()};
      NASDET_KERNEL(conv_direct_tiles)(job, band, std::min(pixels(w), band + step), w.from, w.to);
    }
  });
}

// All target pixels of all families, as many panels at a time as the scratch holds.
inline void run_families(const ConvProblem& p, std::vector<ConvFamily>& families, const ConvMap& source,
                         const ConvMap& target, bool transposed) {
  const int64_t zero_bytes = int64_t(Scratch::padded(size_t(source.channels * stored_bytes(p.storage))));
  const int64_t room = std::max<int64_t>(scratch_limit() - zero_bytes, 0);
  const PanelBytes bytes(p, families);
  const int64_t held = std::max(bytes.most, std::min(bytes.all, room));
  Scratch scratch{size_t(zero_bytes + held)};
  char* const zeros = scratch.take<char>(size_t(zero_bytes));
  std::memset(zeros, 0, size_t(zero_bytes));
  char* const packed = scratch.take<char>(size_t(held));
  std::vector<ConvWork> work;
  for_packed_panels(
      p, families, packed, held, transposed, p.groups == 1,
      [&](const ConvFamily& f, int64_t first, int64_t last) {
        for (const auto& [from, to] : panel_tasks(f.panels, first, last, kTaskSources)) work.push_back({&f, from, to});
      },
      [&] {
        run_work(p, work, source, target, zeros);
        work.clear();
      });
}

inline void direct_forward(const ConvProblem& p, const void* x, void* y) {
  const std::vector<ConvPart> parts = parts_of(p);
  const ConvMap source{x, p.in_channels, p.height, p.width}, target{y, p.out_channels, p.out_height, p.out_width};
  std::vector<ConvFamily> families;
  if (suits_tiles(p)) {
    families = forward_plan(p, kTilesShape, parts);
    if (run_on_tiles(p, families, source, target, false)) return;
  }
  families = forward_plan(p, NASDET_KERNEL(conv_direct_shape)(p.storage), parts);
  run_families(p, families, source, target, false);
}

inline void direct_data_grad(const ConvProblem& p, const std::vector<ConvPart>& parts, const void* grad, void* dx) {
  const ConvMap source{grad, p.out_channels, p.out_height, p.out_width}, target{dx, p.in_channels, p.height, p.width};
  const bool tiled = suits_tiles(p);
  bool complete;
  std::vector<ConvFamily> families =
      backward_plan(p, tiled ? kTilesShape : NASDET_KERNEL(conv_direct_shape)(p.storage), parts, &complete);
  if (!complete) std::memset(dx, 0, size_t(p.images * p.height * p.width * p.in_channels * stored_bytes(p.storage)));
  if (tiled && run_on_tiles(p, families, source, target, true)) return;
  if (tiled) families = backward_plan(p, NASDET_KERNEL(conv_direct_shape)(p.storage), parts, &complete);
  run_families(p, families, source, target, true);
}

inline std::vector<GradUnit> grad_units(const ConvProblem& p, const std::vector<ConvPart>& parts,
                                        const std::vector<std::vector<ConvSpan>>& taps) {
  const ConvShape shape = NASDET_KERNEL(conv_direct_shape)(p.storage);
  const int64_t fan = p.in_channels / p.groups, width = p.out_channels / p.groups;
  std::vector<GradUnit> units;
  for (const int64_t step : {60, 30, 18}) {  // multiples of a tile's 6 channels; smaller ones where tasks are few
    units.clear();
    for (size_t i = 0; i < parts.size(); ++i) {
      ConvFamily family{form_of(p.storage, shape, fan, width, p.groups, false), {}, {}, {}, {}};
      add_panels(family, shape, parts[i].first, parts[i].last, width, fan);
      for (const auto& [from, to] : panel_tasks(family.panels, 0, int64_t(family.panels.size()), kGradSources)) {
        const std::vector<ConvPanel> panels(family.panels.begin() + from, family.panels.begin() + to);
        for (int64_t first = 0; first < fan; first += step) {
          const int64_t last = std::min(fan, first + step);
          int64_t bytes = 0;
          for (const ConvPanel& panel : panels)
            bytes += int64_t(Scratch::padded(size_t(
                int64_t(taps[i].size()) * (last - first) *
                NASDET_KERNEL(conv_direct_width)(p.storage, family.form, panel.width) * arithmetic_bytes(p.storage))));
          units.push_back({&parts[i], &taps[i], family.form, panels, first, last, first / step, bytes});
        }
      }
    }
    if (units.size() >= 8 || step >= 2 * fan) break;
  }
  return units;
}

inline void direct_weight_grad(const ConvProblem& p, const std::vector<ConvPart>& parts, const void* x,
                               const void* grad) {
  std::vector<std::vector<ConvSpan>> taps;
  for (const ConvPart& part : parts) {
    taps.emplace_back();
    for (const Tap& tap : part.taps) taps.back().push_back({tap.first, tap.second, 0, 0, 0});
  }
  std::vector<GradUnit> units = grad_units(p, parts, taps);
  int64_t ranges = 0, most = 0, all = 0;
  for (const GradUnit& unit : units)
    ranges = std::max(ranges, unit.range + 1), most = std::max(most, unit.bytes), all += unit.bytes;
  const int64_t zero_bytes =
      int64_t(Scratch::padded(size_t(std::max(p.in_channels, p.out_channels) * stored_bytes(p.storage))));
  const int64_t mix_bytes = int64_t(
      Scratch::padded(size_t(ranges * int64_t(p.branches.size()) * p.out_channels * arithmetic_bytes(p.storage))));
  const int64_t held = std::max(most, std::min(all, std::max<int64_t>(scratch_limit() - zero_bytes - mix_bytes, 0)));
  Scratch scratch{size_t(zero_bytes + mix_bytes + held)};
  char* const zeros = scratch.take<char>(size_t(zero_bytes));
  std::memset(zeros, 0, size_t(zero_bytes));
  char* const mixes = scratch.take<char>(size_t(mix_bytes));
  char* const sums = scratch.take<char>(size_t(held));
  for (size_t first = 0, last; first < units.size(); first = last) {
    int64_t used = 0;
    for (last = first; last < units.size() && used + units[last].bytes <= held; ++last) {
      char* at = sums + used;
      for (ConvPanel& panel : units[last].panels) {
        panel.weights = at;
        at += Scratch::padded(size_t(int64_t(units[last].taps->size()) * (units[last].last - units[last].first) *
                                     NASDET_KERNEL(conv_direct_width)(p.storage, units[last].form, panel.width) *
                                     arithmetic_bytes(p.storage)));
      }
      used += units[last].bytes;
    }
    for_tasks(int64_t(last - first), threads(), [&](int64_t, int64_t i) {
      const GradUnit& unit = units[first + size_t(i)];
      NASDET_KERNEL(conv_direct_weight_grad)({p.storage,
                                              unit.form,
                                              {x, p.in_channels, p.height, p.width},
                                              {grad, p.out_channels, p.out_height, p.out_width},
                                              zeros,
                                              p.images,
                                              p.stride_h,
                                              p.stride_w,
                                              unit.taps->data(),
                                              int64_t(unit.taps->size()),
                                              unit.first,
                                              unit.last,
                                              unit.panels.data(),
                                              int64_t(unit.panels.size())});
      unfold_unit(p, unit, mixes);
    });
  }
  p.storage == 1 ? sum_mixes(p, reinterpret_cast<const double*>(mixes), ranges)
                 : sum_mixes(p, reinterpret_cast<const float*>(mixes), ranges);
}

inline void direct_backward(const ConvProblem& p, const void* x, const void* grad, void* dx) {
  const std::vector<ConvPart> parts = parts_of(p);
  if (dx) direct_data_grad(p, parts, grad, dx);
  if (p.weight_grads() && !(suits_tiles(p) && weight_grad_on_tiles(p, parts, x, grad)))
    direct_weight_grad(p, parts, x, grad);
}

// Products a second of one thread, measured where a core does 16 float32 products a cycle at 3.7 GHz.
inline double direct_rate(const ConvProblem& p) {
  const ConvShape shape = NASDET_KERNEL(conv_direct_shape)(p.storage);
  const int64_t fan = p.in_channels / p.groups, width = p.out_channels / p.groups;
  const double slower = p.storage == 1 ? 0.5 : 1;
  if (suits_tiles(p)) return 800e9 * tiles_filled(p);
  if (shape.lanes * arithmetic_bytes(p.storage) < 32) return 10e9 * slower;  // no fused multiply-add
  switch (form_of(p.storage, shape, fan, width, p.groups, fan % 2 == 0)) {
    case ConvForm::depthwise:
      return 7e9 * slower;
    case ConvForm::narrow:
      return width <= 4 ? 18e9 : width <= 8 ? 28e9 : 42e9;
    case ConvForm::narrow_pairs:
      return width <= 4 ? 30e9 : width <= 8 ? 45e9 : 65e9;
    case ConvForm::pairs:
      return 100e9;
    default:
      return 53e9 * slower;
  }
}

// The share of the outputs of one axis at which a tap lies on the map, or at which the other pixels of its tile need it.
inline double share_reached(int64_t tap, int64_t stride, int64_t outputs, int64_t size, int64_t beside) {
  const int64_t first = tap < 0 ? (-tap + stride - 1) / stride : 0;
  const int64_t last = std::min(outputs, (size - tap + stride - 1) / stride);
  return double(std::min(outputs, last - first + beside)) / double(outputs);
}

inline double direct_seconds(const ConvProblem& p, bool backward) {
  constexpr int64_t kBeside = 5;          // pixels of a tile, but one
  constexpr double kOutgrown = 16 << 20;  // bytes of weights that leave the outer cache
  constexpr double kAlone = .5;           // of a vector's time more for one that has no other beside it in its panel
  double products = 0, folded = 0;
  const ConvShape shape = NASDET_KERNEL(conv_direct_shape)(p.storage);
  const int64_t lanes = p.groups == 1 ? shape.lanes : 1;  // a slice takes whole vectors
  for (const ConvPart& part : parts_of(p)) {
    double taps = 0;
    for (const Tap& tap : part.taps)
      taps += share_reached(tap.first, p.stride_h, p.out_height, p.height, 0) *
              share_reached(tap.second, p.stride_w, p.out_width, p.width, kBeside);
    const int64_t vectors = (part.last - part.first + lanes - 1) / lanes;
    const bool alone = lanes > 1 && vectors % (shape.panel / shape.lanes) == 1;
    products += taps * double(lanes) * (double(vectors) + (alone ? kAlone : 0));
  }
  const double fan = double(p.in_channels / p.groups);
  for (const ConvBranch& b : p.branches) folded += fan * p.kernel * p.kernel * double(b.last - b.first);
  products *= double(p.images * p.out_height * p.out_width) * fan;
  const int passes = backward ? int(p.input_grad) + int(p.weight_grads()) : 1;
  const bool outgrown = folded * 4 > kOutgrown;
  double weight = outgrown ? 1.25e-9 : 1e-9;                                      // to a panel
  if (backward) weight = shape.lanes < 16 ? 2.4e-9 : outgrown ? 1.7e-9 : 1.2e-9;  // and its gradient from one
  return 2e-5 + passes * (folded * weight + products / direct_rate(p));
}

}  // namespace
}  // namespace nasdet
