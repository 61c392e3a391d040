// How maps are copied for the direct convolution on matrix tiles: how far taps reach, and bands that the scratch has room for.
#pragma once
#include <algorithm>
#include <vector>

#include "conv_amx_jobs.h"
#include "conv_direct_plan.h"

namespace nasdet {
namespace {

constexpr ConvShape kTilesShape{kAmxSide, kAmxSide, false, true}, kTilesGradShape{2 * kAmxSide, kAmxSide, false, true};

// A copy has a plane for each pixel of a stride's step, most of which no tap reads where the steps are long.
inline bool suits_tiles(const ConvProblem& p) {
  constexpr int64_t kMostPlanes = 16;
  const int64_t least = std::min(p.in_channels, p.out_channels) / p.groups;
  return p.storage == 2 && int64_t(p.stride_h) * p.stride_w <= kMostPlanes && least >= (p.groups == 1 ? 8 : 4) &&
         tiles() != Tiles::none;
}

// The share of the tiles' products that are the problem's: channels fill them up, and zeros follow each row.
inline double tiles_filled(const ConvProblem& p) {
  const auto filled = [](int64_t channels, int64_t tile) {
    return double(channels) / double((channels + tile - 1) / tile * tile);
  };
  int64_t beyond = 0;
  for (const ConvBranch& b : p.branches) beyond = std::max<int64_t>(beyond, p.kernel / 2 * int64_t(b.dilation_w));
  const int64_t pitch = p.out_width + std::min(p.out_width, (beyond + p.stride_w - 1) / p.stride_w);
  const int64_t fan = p.in_channels / p.groups;
  const int64_t width = p.out_channels / p.groups;
  const int64_t shared = shared_groups(ConvForm::tiles, p.groups, fan, width);
  return filled(shared * fan, kAmxTerms) * filled(shared * width, kAmxSide) / double(shared) * double(p.out_width) /
         double(pitch);
}

inline int64_t floored(int64_t a, int64_t b) { return (a - modulo(a, b)) / b; }

// What target pixels read of the planes of a copy: rows and columns away from their own, at least and at most.
struct TileReach {
  int64_t step_h, step_w, first_row = 0, last_row = 0, first_column = 0, last_column = 0;

  void add(int64_t down, int64_t across) {
    first_row = std::min(first_row, floored(down, step_h)), last_row = std::max(last_row, floored(down, step_h));
    first_column = std::min(first_column, floored(across, step_w));
    last_column = std::max(last_column, floored(across, step_w));
  }
  int64_t rows_beyond() const { return last_row - first_row; }
  int64_t columns_beyond() const { return std::max(last_column, -first_column); }
};

// Blocks of source channels, each of them once.
struct TileBlocks {
  std::vector<ConvSpan> all;  // channel and count

  // The number of the block that begins with a channel.
  int64_t find(int64_t channel) const {
    return std::find_if(all.begin(), all.end(), [&](const ConvSpan& b) { return b.channel == channel; }) - all.begin();
  }
  void add(int64_t channel, int64_t count) {
    if (find(channel) == int64_t(all.size())) all.push_back({0, 0, channel, count, 0});
  }
};

// Target images and rows that are worked on at a time: whole images, or some rows of one.
struct TileBands { int64_t images, rows; };

// The copy for bands of `rows` target rows of `columns` pixels, its data yet to come. Its positions are an even number.
inline TileCopy copy_of(const ConvMap& source, const TileReach& reach, const TileBlocks& blocks, const TileBands& bands,
                        int64_t columns) {
  TileCopy copy{source,
                nullptr,
                blocks.all.data(),
                int64_t(blocks.all.size()),
                reach.step_h,
                reach.step_w,
                0,
                bands.images,
                0,
                bands.rows + reach.rows_beyond(),
                -reach.first_column,
                columns + reach.columns_beyond(),
                0,
                bands.images};
  const int64_t behind = 2 * kTilePositions + reach.columns_beyond();  // that a last step reads too
  copy.positions = (copy.lead + copy.rows * copy.pitch + behind + 1) / 2 * 2;
  return copy;
}

// The largest bands of which `bytes` does not exceed `room`; rows in multiples of `multiple`.
template <class Bytes>
TileBands bands_within(int64_t images, int64_t rows, int64_t multiple, int64_t room, const Bytes& bytes) {
  TileBands bands{1, std::min(rows, multiple)};
  if (bytes(TileBands{1, rows}) <= room) {
    bands.rows = rows;
    while (bands.images < images && bytes(TileBands{bands.images + 1, rows}) <= room) ++bands.images;
    return bands;
  }
  while (bands.rows + multiple < rows && bytes(TileBands{1, bands.rows + multiple}) <= room) bands.rows += multiple;
  return bands;
}

// Puts a copy to a band's place; the distances in it stay those of the largest band.
inline void place_copy(TileCopy& copy, const TileReach& reach, int64_t first_image, int64_t images, int64_t first_row,
                       int64_t rows) {
  copy.first_image = first_image, copy.images = images;
  copy.first_row = first_row + reach.first_row, copy.rows = rows + reach.rows_beyond();
}

// From a target pixel's position in the copy, which counts from the band's first row, to the one that a tap reads.
inline int64_t tap_distance(const TileCopy& copy, const TileReach& reach, int64_t down, int64_t across) {
  const int64_t plane = modulo(down, copy.step_h) * copy.step_w + modulo(across, copy.step_w);
  return plane * copy.positions + copy.lead + (floored(down, copy.step_h) - reach.first_row) * copy.pitch +
         floored(across, copy.step_w);
}

// All bands in turn: body(first image, images, first row, rows).
template <class Body> void for_bands(const TileBands& bands, int64_t images, int64_t rows, const Body& body) {
  for (int64_t image = 0; image < images; image += bands.images)
    for (int64_t row = 0; row < rows; row += bands.rows)
      body(image, std::min(bands.images, images - image), row, std::min(bands.rows, rows - row));
}

}  // namespace
}  // namespace nasdet
