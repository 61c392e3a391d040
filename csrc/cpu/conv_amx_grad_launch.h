// The launcher of the direct convolution on matrix tiles: the gradient of the weights.
#pragma once
#include "conv_amx_launch.h"

namespace nasdet {
namespace {

constexpr int64_t kChunkPositions =
    512;  // about; a chunk is whole rows whatever the scratch, for sums to keep their order

// What does not change between bands.
struct TileGradPlan {
  TileReach reach;
  TileBlocks blocks;                   // of input channels
  std::vector<ConvPanel> panels;       // of output channels, those of all parts
  std::vector<GradUnit> units;         // a panel and a block each
  std::vector<int64_t> panel, block;   // of each unit
  std::vector<std::vector<Tap>> taps;  // of each part
  std::vector<size_t> part;            // of each panel
  int64_t ranges, chunk_rows, steps;
};

inline TileGradPlan grad_plan(const ConvProblem& p, const std::vector<ConvPart>& parts) {
  const int64_t fan = p.in_channels / p.groups, width = p.out_channels / p.groups;
  TileGradPlan plan{{p.stride_h, p.stride_w}, {}, {}, {}, {}, {}, {}, {}, (fan + kAmxTerms - 1) / kAmxTerms, 0, 0};
  for (size_t i = 0; i < parts.size(); ++i) {
    plan.taps.push_back(parts[i].taps);
    for (const Tap& tap : parts[i].taps) plan.reach.add(tap.first, tap.second);
    ConvFamily family{ConvForm::tiles, {}, {}, {}, {}};
    family.shared = shared_groups(family.form, p.groups, fan, width);
    add_panels(family, kTilesGradShape, parts[i].first, parts[i].last, width, fan);
    for (const ConvPanel& panel : family.panels) {
      const int64_t lanes = NASDET_KERNEL(conv_direct_width)(p.storage, family.form, panel.width);
      const int64_t bytes = int64_t(Scratch::padded(parts[i].taps.size() * size_t(lanes * kAmxTerms) * sizeof(float)));
      for (int64_t range = 0; range < plan.ranges; ++range) {
        const int64_t first = range * kAmxTerms;
        const int64_t last = std::min(fan, first + kAmxTerms);
        const int64_t channel = panel.source + first;
        plan.blocks.add(channel, std::min(family.shared * (last - first), p.in_channels - channel));
        plan.units.push_back({&parts[i], nullptr, family.form, {panel}, first, last, range, bytes, family.shared});
        plan.panel.push_back(int64_t(plan.panels.size())), plan.block.push_back(plan.blocks.find(channel));
      }
      plan.panels.push_back(panel), plan.part.push_back(i);
    }
  }
  const int64_t pitch = p.out_width + plan.reach.columns_beyond();
  plan.chunk_rows = std::min(p.out_height, std::max<int64_t>(1, kChunkPositions / pitch));
  plan.steps = ((plan.chunk_rows - 1) * pitch + p.out_width + kTilePositions - 1) / kTilePositions;
  return plan;
}

inline int64_t chunk_bytes(const TileGradPlan& plan, const TileBands& bands) {
  return bands.images * ((bands.rows + plan.chunk_rows - 1) / plan.chunk_rows) * int64_t(plan.panels.size()) * 2 *
         plan.steps * kAmxTileBytes;
}

// Copies and turns what a band of input and gradient needs. Whether all of it is finite.
inline bool prepare_band(const TileCopy& copy, char* pairs, const TileChunks& chunks, const void* zeros) {
  if (!copy_band(copy)) return false;
  std::atomic<bool> finite{true};
  const int64_t planes = copy.block_count * copy.most_images * copy.planes(), count = chunks.images * chunks.of_image();
  for_tasks(planes + count, threads(), [&](int64_t, int64_t i) {
    if (i < planes) {
      if (i / copy.planes() % copy.most_images < copy.images) NASDET_TILE_KERNEL(conv_amx_pair_plane)(copy, pairs, i);
    } else if (!NASDET_TILE_KERNEL(conv_amx_turn_chunk)(chunks, zeros, i - planes)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

// The sums of units [first, last) over one band.
inline void grad_band(const TileGradPlan& plan, size_t first, size_t last, const TileCopy& copy, const char* pairs,
                      const TileChunks& chunks, bool fresh) {
  std::vector<std::vector<int64_t>> distances;
  for (const std::vector<Tap>& taps : plan.taps) {
    distances.emplace_back();
    for (const Tap& tap : taps) distances.back().push_back(tap_distance(copy, plan.reach, tap.first, tap.second));
  }
  const int64_t units = int64_t(last - first), shares = threads() == 1 ? 1 : (8 * threads() + units - 1) / units;
  for_tasks(units * shares, threads(), [&](int64_t, int64_t i) {
    const size_t unit = first + size_t(i / shares);
    const int64_t panel = plan.panel[unit];
    const std::vector<int64_t>& taps = distances[plan.part[size_t(panel)]];
    const int64_t count = int64_t(taps.size()), share = i % shares;
    NASDET_TILE_KERNEL(conv_amx_grad)({&copy, &chunks, pairs, taps.data(), plan.block[unit], panel,
                                       count * share / shares, count * (share + 1) / shares,
                                       static_cast<float*>(plan.units[unit].panels[0].weights), fresh});
  });
}

// The sums of units [first, last), complete, to the gradients of weights and mix.
inline void finish_units(const ConvProblem& p, const TileGradPlan& plan, size_t first, size_t last, char* mixes) {
  for_tasks(int64_t(last - first), threads(), [&](int64_t, int64_t i) {
    const GradUnit& unit = plan.units[first + size_t(i)];
    const int64_t width = NASDET_KERNEL(conv_direct_width)(p.storage, unit.form, unit.panels[0].width);
    const int64_t taps = int64_t(unit.part->taps.size()), rows = unit.shared * (unit.last - unit.first);
    NASDET_TILE_KERNEL(conv_amx_turn_sums)(static_cast<float*>(unit.panels[0].weights), taps, width, rows);
    unfold_unit(p, unit, mixes);
  });
}

// False, and nothing done, where input or gradient hold infinity or NaN: the zeros between rows would spread them.
inline bool weight_grad_on_tiles(const ConvProblem& p, const std::vector<ConvPart>& parts, const void* x,
                                 const void* grad) {
  TileGradPlan plan = grad_plan(p, parts);
  const ConvMap source{x, p.in_channels, p.height, p.width}, target{grad, p.out_channels, p.out_height, p.out_width};
  const auto copy_bytes = [&](const TileBands& bands) {
    const TileCopy copy = copy_of(source, plan.reach, plan.blocks, bands, p.out_width);
    return int64_t(Scratch::padded(size_t(copy.block_count * copy.block_bytes())));
  };
  const auto band_bytes = [&](const TileBands& bands) {
    return 3 * copy_bytes(bands) + int64_t(Scratch::padded(size_t(chunk_bytes(plan, bands))));
  };
  int64_t most = 0, all = 0;
  for (const GradUnit& unit : plan.units) most = std::max(most, unit.bytes), all += unit.bytes;
  const int64_t zero_bytes = int64_t(Scratch::padded(size_t(p.out_channels * stored_bytes(p.storage))));
  const int64_t mix_bytes =
      int64_t(Scratch::padded(size_t(plan.ranges * int64_t(p.branches.size()) * p.out_channels) * sizeof(float)));
  const int64_t room = std::max<int64_t>(scratch_limit() - zero_bytes - mix_bytes, 0);
  const TileBands bands =
      bands_within(p.images, p.out_height, plan.chunk_rows, std::max(room / 2, room - all), band_bytes);
  const int64_t held = std::max(most, std::min(all, room - band_bytes(bands)));
  Scratch scratch{size_t(zero_bytes + mix_bytes + band_bytes(bands) + held)};
  char* const zeros = scratch.take<char>(size_t(zero_bytes));
  std::memset(zeros, 0, size_t(zero_bytes));
  char* const mixes = scratch.take<char>(size_t(mix_bytes));
  TileCopy copy = copy_of(source, plan.reach, plan.blocks, bands, p.out_width);
  copy.data = scratch.take<char>(size_t(copy_bytes(bands)));
  char* const pairs = scratch.take<char>(size_t(2 * copy_bytes(bands)));
  TileChunks chunks{};
  chunks.target = target;
  chunks.data = scratch.take<char>(size_t(chunk_bytes(plan, bands)));
  chunks.panels = plan.panels.data();
  chunks.panel_count = int64_t(plan.panels.size());
  chunks.chunk_rows = plan.chunk_rows;
  chunks.pitch = copy.pitch;
  chunks.steps = plan.steps;
  char* const sums = scratch.take<char>(size_t(held));
  bool finite = true, ready = false;
  for (size_t first = 0, last; first < plan.units.size() && finite; first = last) {
    int64_t used = 0;
    for (last = first; last < plan.units.size() && used + plan.units[last].bytes <= held; ++last) {
      plan.units[last].panels[0].weights = sums + used;
      used += plan.units[last].bytes;
    }
    for_bands(bands, p.images, p.out_height, [&](int64_t first_image, int64_t images, int64_t first_row, int64_t rows) {
      place_copy(copy, plan.reach, first_image, images, first_row, rows);
      chunks.first_image = first_image, chunks.images = images, chunks.first_row = first_row, chunks.rows = rows;
      if (!ready) finite &= prepare_band(copy, pairs, chunks, zeros);
      ready = bands.images >= p.images && bands.rows >= p.out_height;
      if (finite) grad_band(plan, first, last, copy, pairs, chunks, first_image == 0 && first_row == 0);
    });
    if (!finite) break;
    finish_units(p, plan, first, last, mixes);
  }
  if (finite) sum_mixes(p, reinterpret_cast<const float*>(mixes), plan.ranges);
  return finite;
}

}  // namespace
}  // namespace nasdet
