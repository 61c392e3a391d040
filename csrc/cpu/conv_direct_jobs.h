// What the direct convolution hands across the instruction-set boundary.
//
// Forward and data gradient are one thing: every target pixel is a sum over taps and source channels. The target is the
// result and the source the input in the forward; the other way round in the data gradient.
#pragma once
#include "nasdet/amx.h"

namespace nasdet {

constexpr int64_t kSpanChannels = 64;   // source channels of a span, at most
constexpr int64_t kTaskChannels = 128;  // target channels of a task, about
constexpr int64_t kTaskSources =
    512;  // source channels that the panels of one task read, at most (one panel may: more)
constexpr int64_t kGradSources = 128;  // the same in the weight gradient

// How lanes are used. Dense: a panel's lanes are the target channels of one group, 6 pixels a tile. Narrow: the same for
// groups of few channels, in shorter vectors and more pixels a tile. Depthwise: lanes are groups of one channel each.
// Pairs: dense or narrow, with products of pairs of bfloat16. Tiles: such products of whole matrices (conv_amx.cpp).
enum class ConvForm : int { dense, narrow, depthwise, pairs, narrow_pairs, tiles };

inline constexpr bool is_narrow(ConvForm form) { return form == ConvForm::narrow || form == ConvForm::narrow_pairs; }
inline constexpr bool has_pairs(ConvForm form) {
  return form == ConvForm::pairs || form == ConvForm::narrow_pairs || form == ConvForm::tiles;
}

// Source channels of a span, at most; and the rows of packed weights that so many have: zeros fill tiles up.
inline constexpr int64_t span_channels(ConvForm form) { return form == ConvForm::tiles ? kAmxTerms : kSpanChannels; }
inline constexpr int64_t packed_channels(ConvForm form, int64_t channels) {
  return form == ConvForm::tiles ? (channels + kAmxTerms - 1) / kAmxTerms * kAmxTerms : channels;
}

// What the kernels of one instruction set prefer.
struct ConvShape {
  int64_t panel;  // target channels of a dense panel
  int64_t lanes;  // of a vector of the arithmetic
  bool pairs;     // whether it has the forms of pairs
  bool tiles;     // whether all is done in the form of tiles
};

// One tap over consecutive source channels, and its first row in the packed weights.
struct ConvSpan { int64_t down, across, channel, count, row; };

// Target channels [target, target + width) that read source channels from `source` on. weights: [rows][padded width].
struct ConvPanel {
  int64_t target, width, source;
  void* weights;
};

// Where a panel lies among the rows and lanes of weights or sums that several groups share; one alone begins them.
struct ConvCorner { int64_t channel, channels, lane, lanes; };

struct ConvMap {
  const void* data;
  int64_t channels, height, width;
};

// Target pixels (first_row + i * step_h, first_column + j * step_w), i < rows, j < columns, of every image; they read
// the source around (i * source_step_h, j * source_step_w). Pixels are numbered across rows and images.
struct ConvLattice { int64_t first_row, first_column, step_h, step_w, rows, columns, source_step_h, source_step_w; };

struct ConvTiles {
  int storage;
  ConvForm form;
  ConvMap source, target;
  const void* zeros;  // a source pixel of zeros
  ConvLattice lattice;
  const ConvSpan* spans;
  int64_t span_count;
  const ConvPanel* panels;
};

// Adds the weights of one branch to a panel, folded with its factors.
struct ConvPack {
  int storage;
  ConvForm form;
  const void* weight;     // of the branch
  const void* mix;        // of the branch, or null
  int64_t first;          // output channel that both begin with
  int64_t fan, taps_all;  // input channels of a group, kernel * kernel
  const int32_t* place;   // [taps_all] the tap's place among `taps`, or -1: not in this panel
  int64_t taps, row;      // of the panel's rows that this part fills, and the first
  bool transposed;        // rows are output channels [out, out + outs), lanes input channels from `in` on
  int64_t out, outs, in;
  ConvCorner corner;
};

// The gradient of the weights of some panels for input channels [first, last) of their groups.
struct ConvWeightGrad {
  int storage;
  ConvForm form;
  ConvMap source, target;  // the input, and the gradient of the output
  const void* zeros;
  int64_t images, stride_h, stride_w;
  const ConvSpan* taps;  // down and across only
  int64_t tap_count, first, last;
  const ConvPanel* panels;  // weights: sums [taps][last - first][padded width], written
  int64_t panel_count;
};

// Hands sums of a panel to one branch: weight_grad = mix * sum, and a part of mix_grad.
struct ConvUnfold {
  int storage;
  const void *weight, *mix;
  void *weight_grad,
      *mix_grad;      // of the branch; mix_grad: a part of it, in the arithmetic's type; either null: not wanted
  int64_t first_out;  // output channel that they begin with
  int64_t fan, taps_all;
  const int32_t* place;
  int64_t first, last;  // input channels of the group
  ConvCorner corner;
};

}  // namespace nasdet
