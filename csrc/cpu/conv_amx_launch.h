// The launchers of the direct convolution on matrix tiles: forward and data gradient.
#pragma once
#include "conv_amx_plan.h"
#include "conv_direct_panels.h"
#include "scratch.h"
#include "tasks.h"

namespace nasdet {
namespace {

constexpr int64_t kTaskBlocks = 32;  // of 32 positions by a panel

// Copies a source's band. Whether all of it is finite.
inline bool copy_band(const TileCopy& copy) {
  std::atomic<bool> finite{true};
  for_tasks(copy.images * copy.planes() * copy.rows, threads(), [&](int64_t, int64_t i) {
    if (!NASDET_TILE_KERNEL(conv_amx_copy_row)(copy, i)) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

// Some panels of a family, whose weights are packed.
struct TileWork {
  const ConvFamily* family;
  int64_t from, to;
};

struct TileTask {
  const TileSums* sums;
  const ConvPanel* panel;
  const char* source;
  int64_t image, first, last;
};

// The blocks that families read, those of one panel side by side.
inline TileBlocks source_blocks(const std::vector<ConvFamily>& families, const ConvMap& source) {
  TileBlocks blocks;
  for (const ConvFamily& f : families)
    for (size_t i = 0; i < f.panels.size(); ++i) {
      const int64_t first = f.panels[i].source;
      if (i > 0 && f.panels[i - 1].source == first) continue;
      for (const ConvSpan& span : f.spans)
        blocks.add(first + span.channel, std::min(span.count, source.channels - first - span.channel));
    }
  return blocks;
}

// The targets of a band: some positions for all panels, while they are in the cache, then the next.
inline void sum_band(const std::vector<TileWork>& work, const TileCopy& copy, const TileBlocks& blocks,
                     const TileReach& reach, const ConvMap& target, int64_t first_row, int64_t rows) {
  std::vector<std::vector<int64_t>> terms(work.size());
  std::vector<TileSums> sums(work.size());
  std::vector<TileTask> tasks;
  for (size_t w = 0; w < work.size(); ++w) {
    const ConvFamily& family = *work[w].family;
    const int64_t origin = blocks.find(family.panels[0].source + family.spans[0].channel);
    for (const ConvSpan& span : family.spans)
      terms[w].push_back((blocks.find(family.panels[0].source + span.channel) - origin) * copy.block_bytes() +
                         tap_distance(copy, reach, span.down, span.across) * kAmxRowBytes);
    sums[w] = {copy.pitch,
               terms[w].data(),
               int64_t(terms[w].size()),
               target,
               family.lattice,
               copy.first_image,
               first_row,
               std::min(rows, family.lattice.rows - first_row)};
  }
  const int64_t most = (rows * copy.pitch + kTilePositions - 1) / kTilePositions;
  for (int64_t image = 0; image < copy.images; ++image)
    for (int64_t first = 0; first < most; first += kTaskBlocks)
      for (size_t w = 0; w < work.size(); ++w) {
        const ConvFamily& family = *work[w].family;
        const int64_t steps =
            ((sums[w].rows - 1) * copy.pitch + family.lattice.columns + kTilePositions - 1) / kTilePositions;
        for (int64_t i = work[w].from; i < work[w].to && first < steps; ++i) {
          const ConvPanel& panel = family.panels[size_t(i)];
          const char* const source = copy.data +
                                     blocks.find(panel.source + family.spans[0].channel) * copy.block_bytes() +
                                     image * copy.planes() * copy.plane_bytes();
          tasks.push_back({&sums[w], &panel, source, image, first, std::min(steps, first + kTaskBlocks)});
        }
      }
  for_tasks(int64_t(tasks.size()), threads(), [&](int64_t, int64_t i) {
    const TileTask& task = tasks[size_t(i)];
    NASDET_TILE_KERNEL(conv_amx_sums)(*task.sums, *task.panel, task.source, task.image, task.first, task.last);
  });
}

// All target pixels of all families: as many panels at a time as the scratch holds, and as much of the source. False, with
// targets undone, where groups share panels and the source holds infinity or NaN: zeros between the groups would spread them.
inline bool run_on_tiles(const ConvProblem& p, std::vector<ConvFamily>& families, const ConvMap& source,
                         const ConvMap& target, bool transposed) {
  TileReach reach{families[0].lattice.source_step_h, families[0].lattice.source_step_w};
  int64_t rows = 0, columns = 0;
  for (const ConvFamily& f : families) {
    rows = std::max(rows, f.lattice.rows), columns = std::max(columns, f.lattice.columns);
    for (const ConvSpan& span : f.spans) reach.add(span.down, span.across);
  }
  const PanelBytes bytes(p, families);
  const TileBlocks blocks = source_blocks(families, source);
  const auto copy_bytes = [&](const TileBands& bands) {
    const TileCopy copy = copy_of(source, reach, blocks, bands, columns);
    return int64_t(Scratch::padded(size_t(copy.block_count * copy.block_bytes())));
  };
  const int64_t limit = scratch_limit();
  const TileBands bands = bands_within(p.images, rows, 1, std::max(limit / 2, limit - bytes.all), copy_bytes);
  const int64_t copied = copy_bytes(bands);
  const int64_t held = std::max(bytes.most, std::min(bytes.all, std::max<int64_t>(limit - copied, 0)));
  const bool whole = bands.images >= p.images && bands.rows >= rows;
  Scratch scratch{size_t(copied + held)};
  TileCopy copy = copy_of(source, reach, blocks, bands, columns);
  copy.data = scratch.take<char>(size_t(copied));
  char* const packed = scratch.take<char>(size_t(held));
  std::vector<TileWork> work;
  bool ready = false, finite = true;
  for_packed_panels(
      p, families, packed, held, transposed, false,
      [&](const ConvFamily& f, int64_t first, int64_t last) { work.push_back({&f, first, last}); },
      [&] {
        for_bands(bands, p.images, rows,
                  [&](int64_t first_image, int64_t images, int64_t first_row, int64_t band_rows) {
                    place_copy(copy, reach, first_image, images, first_row, band_rows);
                    if (!ready) finite &= copy_band(copy) || families[0].shared == 1;
                    ready = whole;
                    if (finite) sum_band(work, copy, blocks, reach, target, first_row, band_rows);
                  });
        work.clear();
      });
  return finite;
}

}  // namespace
}  // namespace nasdet
