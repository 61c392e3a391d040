// A bilinear paste is separable: a pixel is h0 * wy0 + h1 * wy1 with h = a * wx0 + b * wx1 of one image column. So a
// column costs M + 2 horizontal blends, and between two mask rows the value runs from h0 to h1: where both lie clear of
// the threshold, on one side, no pixel is looked at. The others are computed as the reference does, rounding for
// rounding, so this file must be compiled without contraction of a * b + c.
#include "paste_rle.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <thread>

namespace nasdet {
namespace {

constexpr float kFarCoordinate = 0x1p61F;  // beyond it int64 arithmetic on sizes could overflow
// A blend a * w0 + b * w1, its products, sum and w0 = 1 - w1 rounded, leaves the interval between a and b by at most
// 4 * 2^-24 of the larger magnitude: of a mask whose magnitudes reach m, two blends by less than m times this.
constexpr float kRounding = 0x1p-20F;
constexpr std::int64_t kWorkPerThread = 200'000;  // blends worth another thread, roughly 0.1 ms

// The pixels of one image axis that a mask can reach, [first, end), and their two neighbours and weights in the mask
// padded by a zero on either side.
struct Axis {
  std::int64_t first = 0, end = 0;
  std::vector<std::int32_t> low;
  std::vector<float> w0, w1;

  std::int64_t count() const { return end - first; }

  void clear(std::int64_t from, std::int64_t to) {
    first = from;
    end = std::max(from, to);
    low.clear();
    w0.clear();
    w1.clear();
  }

  void push(float source, std::int64_t padded) {
    source = std::min(std::max(source, 0.0F), static_cast<float>(padded));
    const std::int64_t index = std::min(static_cast<std::int64_t>(source), padded - 1);
    const float fraction = std::min(std::max(source - static_cast<float>(index), 0.0F), 1.0F);
    low.push_back(static_cast<std::int32_t>(index));
    w0.push_back(1.0F - fraction);
    w1.push_back(fraction);
  }
};

// torchvision's rule: the box grown by (M + 2) / M about its centre, corners truncated to integers, the last included.
void plan_integer(float a, float b, std::int64_t side, std::int64_t limit, Axis& axis) {
  axis.clear(0, 0);
  const std::int64_t padded = side + 2;
  const float growth = static_cast<float>(static_cast<double>(padded) / static_cast<double>(side));
  const float half = (b - a) * 0.5F * growth;
  const float centre = (b + a) * 0.5F;
  const float from = centre - half, to = centre + half;
  if (!std::isfinite(from) || !std::isfinite(to)) return;
  const auto lo = static_cast<std::int64_t>(std::min(std::max(from, -kFarCoordinate), kFarCoordinate));
  const auto hi = static_cast<std::int64_t>(std::min(std::max(to, -kFarCoordinate), kFarCoordinate));
  const std::int64_t size = std::max<std::int64_t>(hi - lo + 1, 1);
  const float scale = static_cast<float>(padded) / static_cast<float>(size);
  axis.clear(std::max<std::int64_t>(lo, 0), std::min(hi + 1, limit));
  for (std::int64_t pixel = axis.first; pixel < axis.end; ++pixel) {
    axis.push(scale * (static_cast<float>(pixel - lo) + 0.5F) - 0.5F, padded);
  }
}

// detectron2's rule: pixel centres relative to the box, zero outside it, blended over half a mask pixel.
void plan_continuous(float a, float b, std::int64_t side, std::int64_t limit, Axis& axis) {
  axis.clear(0, 0);
  const float size = b - a;
  if (!std::isfinite(a) || !std::isfinite(b) || !std::isfinite(size) || size <= 0.0F) return;
  const float margin = size / static_cast<float>(side) + 2.0F, edge = static_cast<float>(limit);
  const float from = std::min(std::max(a - margin, 0.0F), edge), to = std::min(std::max(b + margin, 0.0F), edge);
  axis.clear(static_cast<std::int64_t>(from), static_cast<std::int64_t>(std::ceil(to)));
  for (std::int64_t pixel = axis.first; pixel < axis.end; ++pixel) {
    const float place = (static_cast<float>(pixel) + 0.5F - a) / size;
    axis.push(place * static_cast<float>(side) + 0.5F, side + 2);
  }
}

// Runs of a column-major bit map, written in COCO's compressed form as they end.
class RunWriter {
 public:
  void set(bool value, std::int64_t position) {
    if (value != state_) {
      run(position - last_);
      last_ = position;
      state_ = value;
    }
  }

  bool value() const { return state_; }

  std::string finish(std::int64_t pixels) {
    run(pixels - last_);
    text_.resize(used_);
    return std::move(text_);
  }

 private:
  static constexpr std::size_t kLongest = 13;  // characters of 64 bits

  // From the fourth run on the difference to the one before the last, in 5-bit groups from the lowest, bit 5 of a
  // character saying that more follow; the last group's bit 4 is the sign.
  void run(std::int64_t length) {
    std::int64_t value = index_ > 2 ? length - before_[1] : length;
    before_[1] = before_[0];
    before_[0] = length;
    ++index_;
    if (text_.size() < used_ + kLongest) text_.resize(2 * used_ + 256);
    char* out = &text_[used_];
    while (value < -16 || value > 15) {
      *out++ = static_cast<char>((value & 31) + 32 + 48);
      value >>= 5;
    }
    *out++ = static_cast<char>((value & 31) + 48);
    used_ = static_cast<std::size_t>(out - text_.data());
  }

  std::string text_;
  std::size_t used_ = 0;
  std::int64_t last_ = 0, before_[2] = {0, 0}, index_ = 0;
  bool state_ = false;
};

// Rows [first, end) of the image between the same two rows of the mask.
struct Segment {
  std::int32_t low;
  std::int64_t first, end;
};

// What one thread needs, kept from mask to mask.
struct Scratch {
  Axis rows, columns;
  std::vector<Segment> segments;
  std::vector<float> padded, highest, blend;
  std::vector<std::int32_t> side;  // of the threshold: 1 above, -1 below, 0 near it or NaN; then sums of neighbours
  float sure_above = 0, sure_below = 0;
};

// The mask with columns contiguous, padded by zeros: two at the far end, so that the last has a neighbour.
void transpose_padded(const float* mask, std::int64_t side, float threshold, Scratch& scratch) {
  const std::int64_t stride = side + 3;
  scratch.padded.assign(static_cast<std::size_t>(stride * stride), 0.0F);
  scratch.highest.assign(static_cast<std::size_t>(stride), 0.0F);
  scratch.blend.resize(static_cast<std::size_t>(stride));
  scratch.side.resize(static_cast<std::size_t>(stride));
  float magnitude = 0.0F;
  for (std::int64_t x = 0; x < side; ++x) {
    float* column = scratch.padded.data() + (x + 1) * stride + 1;
    float highest = 0.0F;
    for (std::int64_t y = 0; y < side; ++y) {  // a NaN is not compared: it sets no pixel
      const float value = mask[y * side + x];
      column[y] = value;
      highest = value > highest ? value : highest;
      magnitude = std::fabs(value) > magnitude ? std::fabs(value) : magnitude;
    }
    scratch.highest[static_cast<std::size_t>(x + 1)] = highest;
  }
  scratch.sure_above = threshold + kRounding * magnitude;
  scratch.sure_below = threshold - kRounding * magnitude;
}

void find_segments(Scratch& scratch) {
  scratch.segments.clear();
  const Axis& rows = scratch.rows;
  for (std::int64_t r = 0; r < rows.count(); ++r) {
    const std::int32_t low = rows.low[static_cast<std::size_t>(r)];
    if (scratch.segments.empty() || scratch.segments.back().low != low) scratch.segments.push_back({low, r, r});
    scratch.segments.back().end = r + 1;
  }
}

// Blends two columns of the padded mask, and notes which pairs of its rows lie on one side: 2 above, -2 below.
void blend_column(Scratch& scratch, std::int64_t low, float w0, float w1) {
  const auto stride = static_cast<std::int64_t>(scratch.blend.size());
  const float* left = scratch.padded.data() + low * stride;
  const float* right = left + stride;
  float* blend = scratch.blend.data();
  std::int32_t* side = scratch.side.data();
  const float above = scratch.sure_above, below = scratch.sure_below;
  for (std::int64_t y = 0; y < stride; ++y) {
    blend[y] = left[y] * w0 + right[y] * w1;
    side[y] = static_cast<std::int32_t>(blend[y] > above) - static_cast<std::int32_t>(blend[y] < below);
  }
  for (std::int64_t y = 0; y + 1 < stride; ++y) side[y] += side[y + 1];
}

// The blended column's rows; `base` is the index of the first in the column-major image, `threshold` is compared with.
void encode_rows(const Scratch& scratch, std::int64_t base, float threshold, RunWriter& writer) {
  const float* w0 = scratch.rows.w0.data();
  const float* w1 = scratch.rows.w1.data();
  std::int32_t settled = writer.value() ? 2 : -2;
  for (const Segment& segment : scratch.segments) {
    const std::int32_t pair = scratch.side[static_cast<std::size_t>(segment.low)];
    if (pair == settled) continue;
    if (pair == 2 || pair == -2) {
      writer.set(pair > 0, base + segment.first);
    } else {
      const float h0 = scratch.blend[static_cast<std::size_t>(segment.low)];
      const float h1 = scratch.blend[static_cast<std::size_t>(segment.low) + 1];
      for (std::int64_t r = segment.first; r < segment.end; ++r) {
        const float value = h0 * w0[r] + h1 * w1[r];
        writer.set(value > threshold, base + r);
      }
    }
    settled = writer.value() ? 2 : -2;
  }
}

std::string encode_mask(const float* mask, std::int64_t side, const PasteOptions& options, Scratch& scratch) {
  RunWriter writer;
  const Axis &rows = scratch.rows, &columns = scratch.columns;
  if (rows.count() > 0 && columns.count() > 0) {
    transpose_padded(mask, side, options.threshold, scratch);
    find_segments(scratch);
    for (std::int64_t c = 0; c < columns.count(); ++c) {
      const auto at = static_cast<std::size_t>(c), low = static_cast<std::size_t>(columns.low[at]);
      const std::int64_t top = (columns.first + c) * options.height;
      if (std::max(scratch.highest[low], scratch.highest[low + 1]) < scratch.sure_below) {
        writer.set(false, top);
        continue;
      }
      blend_column(scratch, columns.low[at], columns.w0[at], columns.w1[at]);
      if (rows.first > 0) writer.set(false, top);
      encode_rows(scratch, top + rows.first, options.threshold, writer);
      if (rows.end < options.height) writer.set(false, top + rows.end);
    }
    if (columns.end < options.width) writer.set(false, columns.end * options.height);
  }
  return writer.finish(options.height * options.width);
}

std::string encode_box(const float* mask, const float* box, std::int64_t side, const PasteOptions& options,
                       Scratch& scratch) {
  const auto plan = options.grid == PasteGrid::kInteger ? plan_integer : plan_continuous;
  plan(box[0], box[2], side, options.width, scratch.columns);
  plan(box[1], box[3], side, options.height, scratch.rows);
  return encode_mask(mask, side, options, scratch);
}

// How many threads the job is worth: blends are columns times mask rows, whatever the height of the boxes.
int useful_threads(const float* boxes, std::int64_t n, std::int64_t side, const PasteOptions& options) {
  double work = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float width = std::min(boxes[4 * i + 2], static_cast<float>(options.width)) - std::max(boxes[4 * i], 0.0F);
    if (width > 0.0F) work += static_cast<double>(width) * static_cast<double>(side);
  }
  const double most = std::min<double>(options.threads, static_cast<double>(n));
  return static_cast<int>(std::max(1.0, std::min(most, 1.0 + work / static_cast<double>(kWorkPerThread))));
}

}  // namespace

std::vector<std::string> paste_to_rle(const float* masks, const float* boxes, std::int64_t n, std::int64_t side,
                                      const PasteOptions& options) {
  std::vector<std::string> counts(static_cast<std::size_t>(n));
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  const auto work = [&] {
    try {
      Scratch scratch;
      for (std::int64_t i = next++; i < n; i = next++) {
        counts[static_cast<std::size_t>(i)] =
            encode_box(masks + i * side * side, boxes + 4 * i, side, options, scratch);
      }
    } catch (const std::bad_alloc&) { out_of_memory = true; }
  };
  std::vector<std::thread> helpers;
  const int threads = useful_threads(boxes, n, side, options);
  helpers.reserve(static_cast<std::size_t>(threads));
  try {
    while (static_cast<int>(helpers.size()) + 1 < threads) helpers.emplace_back(work);
  } catch (const std::exception&) {  // the system gives no more threads or memory: those that began share the work
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (out_of_memory) throw std::bad_alloc();
  return counts;
}

}  // namespace nasdet
