// What the launcher of the direct convolution works out from the branches: which output channels share which taps, and
// which panels and spans follow.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "conv.h"
#include "conv_direct_jobs.h"

namespace nasdet {
namespace {

using Tap = std::pair<int64_t, int64_t>;  // down, across

// Output channels [first, last) that the same branches cover, and the union of their taps.
struct ConvPart {
  int64_t first, last;
  std::vector<const ConvBranch*> branches;
  std::vector<Tap> taps;
  std::vector<std::vector<int32_t>> place;  // [branch][kernel * kernel] tap, or -1: outside of the map for every output
};

// Whether some output i < outputs reads a pixel of the map at i * stride + tap.
inline bool reaches(int64_t tap, int64_t stride, int64_t outputs, int64_t size) {
  const int64_t first = tap < 0 ? (-tap + stride - 1) / stride : 0;
  return first < outputs && first * stride + tap < size;
}

inline Tap tap_of(const ConvProblem& p, const ConvBranch& b, int64_t index) {
  const int64_t radius = p.kernel / 2;
  return {(index / p.kernel - radius) * b.dilation_h, (index % p.kernel - radius) * b.dilation_w};
}

inline std::vector<ConvPart> parts_of(const ConvProblem& p) {
  std::vector<int64_t> cuts;
  for (const ConvBranch& b : p.branches) cuts.push_back(b.first), cuts.push_back(b.last);
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<ConvPart> parts;
  for (size_t c = 0; c + 1 < cuts.size(); ++c) {
    ConvPart part{cuts[c], cuts[c + 1], {}, {}, {}};
    for (const ConvBranch& b : p.branches)
      if (b.first <= part.first && b.last >= part.last) part.branches.push_back(&b);
    const int64_t all = int64_t(p.kernel) * p.kernel;
    const auto used = [&](const Tap& t) {
      return reaches(t.first, p.stride_h, p.out_height, p.height) &&
             reaches(t.second, p.stride_w, p.out_width, p.width);
    };
    for (const ConvBranch* b : part.branches)
      for (int64_t k = 0; k < all; ++k)
        if (const Tap tap = tap_of(p, *b, k); used(tap)) part.taps.push_back(tap);
    std::sort(part.taps.begin(), part.taps.end());
    part.taps.erase(std::unique(part.taps.begin(), part.taps.end()), part.taps.end());
    for (const ConvBranch* b : part.branches) {
      std::vector<int32_t> place(size_t(all), -1);
      for (int64_t k = 0; k < all; ++k) {
        const auto found = std::lower_bound(part.taps.begin(), part.taps.end(), tap_of(p, *b, k));
        if (found != part.taps.end() && *found == tap_of(p, *b, k))
          place[size_t(k)] = int32_t(found - part.taps.begin());
      }
      part.place.push_back(std::move(place));
    }
    parts.push_back(std::move(part));
  }
  return parts;
}

// A part as the panels of one family see it: its taps among theirs, and its rows.
struct ConvSource {
  const ConvPart* part;
  std::vector<std::vector<int32_t>> place;  // like the part's, in `taps`
  int64_t taps, row;
};

// Panels that share spans and target pixels.
struct ConvFamily {
  ConvForm form;
  ConvLattice lattice;
  std::vector<ConvSpan> spans;
  std::vector<ConvPanel> panels;
  std::vector<ConvSource> sources;
  int64_t rows = 0;    // of the packed weights
  int64_t shared = 1;  // groups that share a panel, in the form of tiles: zeros are between them
};

// Groups of `fan` source and `width` target channels that share a panel.
inline int64_t shared_groups(ConvForm form, int64_t groups, int64_t fan, int64_t width) {
  return form == ConvForm::tiles && groups > 1
             ? std::max<int64_t>(1, std::min({groups, kAmxTerms / fan, 2 * kAmxSide / width}))
             : 1;
}

// The form of groups of `fan` source and `width` target channels. `even`: whether all spans have an even number of channels.
inline ConvForm form_of(int storage, const ConvShape& shape, int64_t fan, int64_t width, int64_t groups, bool even) {
  if (shape.tiles) return ConvForm::tiles;
  if (fan == 1 && width == 1 && groups > 1) return ConvForm::depthwise;
  const bool narrow = storage != 1 && groups > 1 && width <= shape.lanes;
  if (shape.pairs && even && narrow) return ConvForm::narrow_pairs;
  if (shape.pairs && even && width > shape.lanes / 2) return ConvForm::pairs;
  return narrow ? ConvForm::narrow : ConvForm::dense;
}

// Panels for target channels [first, last), cut at groups of `width` channels that read `fan` channels each.
inline void add_panels(ConvFamily& family, const ConvShape& shape, int64_t first, int64_t last, int64_t width,
                       int64_t fan) {
  if (family.form == ConvForm::depthwise) {
    for (int64_t c = first; c < last; c += kSpanChannels)
      family.panels.push_back({c, std::min(kSpanChannels, last - c), c, nullptr});
    return;
  }
  for (int64_t c = first; c < last;) {
    const int64_t group = c / width;
    const int64_t end = family.shared > 1 ? std::min(last, c + family.shared * width)
                                          : std::min({last, (group + 1) * width, c + shape.panel});
    family.panels.push_back({c, end - c, group * fan, nullptr});
    c = end;
  }
}

// Spans of `channels` source channels from `channel` on, for each tap: as packed_row counts rows.
inline void add_spans(ConvFamily& family, const std::vector<Tap>& taps, int64_t channel, int64_t channels) {
  const int64_t span = span_channels(family.form);
  for (int64_t s = 0; s < channels; s += span)
    for (const Tap& tap : taps) {
      const int64_t count = std::min(span, channels - s);
      family.spans.push_back({tap.first, tap.second, channel + s, count, family.rows});
      family.rows += packed_channels(family.form, count);
    }
}

inline std::vector<ConvFamily> forward_plan(const ConvProblem& p, const ConvShape& shape,
                                            const std::vector<ConvPart>& parts) {
  const int64_t fan = p.in_channels / p.groups, width = p.out_channels / p.groups;
  std::vector<ConvFamily> families;
  for (const ConvPart& part : parts) {
    ConvFamily family{form_of(p.storage, shape, fan, width, p.groups, fan % 2 == 0),
                      {0, 0, 1, 1, p.out_height, p.out_width, p.stride_h, p.stride_w},
                      {},
                      {},
                      {}};
    family.shared = shared_groups(family.form, p.groups, fan, width);
    family.sources.push_back({&part, part.place, int64_t(part.taps.size()), 0});
    add_spans(family, part.taps, 0, family.shared * fan);
    add_panels(family, shape, part.first, part.last, width, fan);
    families.push_back(std::move(family));
  }
  return families;
}

inline int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// The part's taps that reach the input pixels of one phase of the stride, as steps on the output's pixels.
inline void add_source(ConvFamily& family, const ConvProblem& p, const ConvPart& part, int64_t channel,
                       int64_t channels) {
  const ConvLattice& l = family.lattice;
  std::vector<Tap> taps;
  std::vector<int32_t> local(part.taps.size(), -1);
  for (size_t t = 0; t < part.taps.size(); ++t) {
    const int64_t down = l.first_row - part.taps[t].first, across = l.first_column - part.taps[t].second;
    if (modulo(down, p.stride_h) || modulo(across, p.stride_w)) continue;
    local[t] = int32_t(taps.size());
    taps.push_back({down / p.stride_h, across / p.stride_w});
  }
  if (taps.empty()) return;
  ConvSource source{&part, part.place, int64_t(taps.size()), family.rows};
  for (std::vector<int32_t>& places : source.place)
    for (int32_t& place : places) place = place < 0 ? -1 : local[size_t(place)];
  family.sources.push_back(std::move(source));
  add_spans(family, taps, channel, channels);
}

// A phase of the stride that some tap reaches. `complete`: whether every input pixel is a target of some family.
inline std::vector<ConvFamily> backward_plan(const ConvProblem& p, const ConvShape& shape,
                                             const std::vector<ConvPart>& parts, bool* complete) {
  const int64_t fan = p.in_channels / p.groups, width = p.out_channels / p.groups;
  bool even = p.groups == 1 || width % 2 == 0;
  for (const ConvPart& part : parts) even &= p.groups > 1 || (part.last - part.first) % 2 == 0;
  const ConvForm form = form_of(p.storage, shape, width, fan, p.groups, even);
  std::vector<Tap> phases;
  for (const ConvPart& part : parts)
    for (const Tap& tap : part.taps) phases.push_back({modulo(tap.first, p.stride_h), modulo(tap.second, p.stride_w)});
  std::sort(phases.begin(), phases.end());
  phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
  std::vector<ConvFamily> families;
  int64_t covered = 0;
  for (const Tap& phase : phases) {
    if (phase.first >= p.height || phase.second >= p.width) continue;
    const ConvLattice lattice{phase.first,
                              phase.second,
                              p.stride_h,
                              p.stride_w,
                              (p.height - phase.first + p.stride_h - 1) / p.stride_h,
                              (p.width - phase.second + p.stride_w - 1) / p.stride_w,
                              1,
                              1};
    const size_t before = families.size();
    if (p.groups == 1) {
      ConvFamily family{form, lattice, {}, {}, {}};
      for (const ConvPart& part : parts) add_source(family, p, part, part.first, part.last - part.first);
      add_panels(family, shape, 0, p.in_channels, p.in_channels, 0);
      families.push_back(std::move(family));
    } else {
      for (const ConvPart& part : parts) {
        ConvFamily family{form, lattice, {}, {}, {}};
        family.shared = shared_groups(form, p.groups, width, fan);
        add_source(family, p, part, 0, family.shared * width);
        add_panels(family, shape, part.first / width * fan, part.last / width * fan, fan, width);
        if (!family.spans.empty()) families.push_back(std::move(family));
      }
    }
    covered += families.size() - before == (p.groups == 1 ? 1 : parts.size());
  }
  *complete = covered == std::min<int64_t>(p.height, p.stride_h) * std::min<int64_t>(p.width, p.stride_w);
  return families;
}

}  // namespace
}  // namespace nasdet
