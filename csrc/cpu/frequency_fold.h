// Which places the folded taps of a convolution have, and the order of their terms.
#pragma once
#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "conv.h"
#include "frequency.h"

namespace nasdet {
namespace {

class TapFold {
 public:
  explicit TapFold(const ConvProblem& p) {
    std::set<std::pair<int32_t, int32_t>> taps;
    for (const ConvBranch& b : p.branches)
      for (int32_t y : {0, b.dilation_h})
        for (int32_t x : {0, b.dilation_w}) taps.insert({y, x});
    for (const auto& [y, x] : taps) places_.push_back({y, x, {-1, -1, -1, -1}});
    for (int parity = 0; parity < 4; ++parity)
      for (FrequencyPlace& place : places_)
        if ((place.x > 0 || parity % 2 == 0) && (place.y > 0 || parity < 2)) place.term[parity] = int32_t(terms_++);
  }

  int64_t terms() const { return terms_; }

  // FrequencyBranch::terms of these dilations.
  void terms_of(int32_t dilation_h, int32_t dilation_w, int32_t (&terms)[9]) const {
    int32_t* next = terms;
    for (int32_t y : {0, dilation_h})
      for (int32_t x : {0, dilation_w})
        for (int32_t term : place_at(y, x).term)
          if (term >= 0) *next++ = term;
  }

  // The terms of a grid of so many rows; valid while this and the vector live.
  FrequencyFold of(int grid, std::vector<int32_t>& ends) const {
    const int rows = grid / 2 + 1;
    ends.assign(size_t(4 * rows), 0);
    for (int parity = 0; parity < 4; ++parity)
      for (const FrequencyPlace& place : places_)
        if (place.term[parity] >= 0) ++ends[size_t(parity * rows + place.y)];
    for (size_t i = 1; i < ends.size(); ++i) ends[i] += ends[i - 1];
    return {places_.data(), int64_t(places_.size()), ends.data(), terms_};
  }

 private:
  const FrequencyPlace& place_at(int32_t y, int32_t x) const {
    return *std::find_if(places_.begin(), places_.end(), [&](const auto& p) { return p.y == y && p.x == x; });
  }

  std::vector<FrequencyPlace> places_;  // by y, then x
  int64_t terms_ = 0;
};

}  // namespace
}  // namespace nasdet
