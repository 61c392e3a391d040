// The depthwise convolution's plan, of lattices and tiles, and its distribution over threads.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "depthwise_conv2d_jobs.h"
#include "nasdet/isa.h"
#include "results.h"
#include "scratch.h"
#include "tasks.h"

namespace nasdet {
namespace {

constexpr int64_t kLeastPixelChannels =
    16;                             // of an NHWC map that is taken as it is: a vector, in every instruction set
constexpr int64_t kMostLanes = 32;  // of a block of columns
constexpr int64_t kGradParts = 16;  // of the images' rows, whose sums are added up in order

struct DepthwiseSide { int64_t in, out, stride, padding, dilation; };

struct DepthwiseProblem {
  int64_t images, channels, kernel;
  DepthwiseSide rows, columns;
  int storage;
  bool pixels;  // whether the maps are taken as NHWC
  int64_t element() const { return storage == 0 ? 4 : storage == 1 ? 8 : 2; }
  int64_t arithmetic() const { return storage == 1 ? 8 : 4; }
};

// The lattices of one axis, with the arrays that they point to.
struct DepthwiseAxes {
  std::vector<DepthwiseAxis> lattices;
  std::vector<std::unique_ptr<int32_t[]>> indices;
  std::vector<std::unique_ptr<int64_t[]>> bases;

  // `used` taps only: those that meet the source somewhere.
  void add(DepthwiseAxis a, const std::vector<std::pair<int32_t, int64_t>>& taps, bool used) {
    std::vector<std::pair<int32_t, int64_t>> kept;
    for (const auto& tap : taps)
      if (!used || (tap.second < a.source && tap.second + a.advance * (a.count - 1) >= 0)) kept.push_back(tap);
    a.taps = int64_t(kept.size());
    std::unique_ptr<int32_t[]> index(new int32_t[size_t(a.taps + 2 * a.count)]);
    std::unique_ptr<int64_t[]> base(new int64_t[size_t(a.taps)]);
    for (int64_t t = 0; t < a.taps; ++t)
      index[size_t(t)] = kept[size_t(t)].first, base[size_t(t)] = kept[size_t(t)].second;
    int32_t* const begin = index.get() + a.taps;
    for (int64_t j = 0; j < a.count; ++j) {
      int32_t first = 0, last = int32_t(a.taps);
      const auto there = [&](int32_t t) {
        return a.advance * j + base[size_t(t)] >= 0 && a.advance * j + base[size_t(t)] < a.source;
      };
      while (first < last && !there(first)) ++first;
      while (first < last && !there(last - 1)) --last;
      begin[j] = first, begin[a.count + j] = last;
    }
    a.tap = index.get(), a.base = base.get(), a.begin = begin, a.end = begin + a.count;
    lattices.push_back(a);
    indices.push_back(std::move(index)), bases.push_back(std::move(base));
  }
};

// The gradient at stride 1 is a forward with the kernel turned round.
inline bool turned(const DepthwiseSide& side, bool gradient) { return gradient && side.stride == 1; }

inline DepthwiseAxes axes_of(const DepthwiseSide& side, int64_t kernel, bool gradient, bool used) {
  DepthwiseAxes axes;
  std::vector<std::pair<int32_t, int64_t>> taps;
  if (!gradient || side.stride == 1) {
    const int64_t first = gradient ? side.padding - (kernel - 1) * side.dilation : -side.padding;
    for (int64_t k = 0; k < kernel; ++k) taps.push_back({int32_t(k), first + k * side.dilation});
    axes.add({0, 1, gradient ? side.in : side.out, side.stride, 0, gradient ? side.out : side.in, nullptr, nullptr,
              nullptr, nullptr},
             taps, used);
    return axes;
  }
  for (int64_t q = 0; q < std::min(side.stride, side.in); ++q) {
    taps.clear();
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t distance = q + side.padding - k * side.dilation;
      if (distance % side.stride == 0) taps.push_back({int32_t(k), distance / side.stride});
    }
    axes.add({q, side.stride, (side.in - q + side.stride - 1) / side.stride, 1, 0, side.out, nullptr, nullptr, nullptr,
              nullptr},
             taps, used);
  }
  return axes;
}

// Which rows read the same source rows, `step` taps on: those `spacing` apart. Step 0: none, or too few.
struct DepthwiseSharing {
  int64_t spacing = 1, step = 0;
  DepthwiseSharing(const DepthwiseSide& side, bool gradient) {
    if (gradient && side.stride > 1) return;  // a phase has half of the taps, in falling order
    const int64_t common = std::gcd(side.stride, side.dilation);
    if (side.stride / common <= 2) spacing = side.dilation / common, step = side.stride / common;
  }
};

// How many rows a tile has at most. At stride 2 two rows share one source, which is not worth it in NHWC where source rows lie
// whole pages apart: so many at once do not stay in the innermost cache.
inline int64_t tile_rows(const DepthwiseProblem& p, const DepthwiseSharing& sharing, int64_t source_width) {
  constexpr int64_t kPage = 4096;
  if (sharing.step != 2) return kDepthwiseRows;
  return p.pixels && source_width * p.channels * p.element() % kPage == 0 ? 1 : 4;
}

// Rows of a lattice in tiles; those of a group, of at most 7 x spacing rows, come together.
inline std::vector<DepthwiseTile> tiles_of(const DepthwiseAxes& axes, const DepthwiseSide& side,
                                           const DepthwiseSharing& sharing, int64_t most) {
  std::vector<DepthwiseTile> tiles;
  for (const DepthwiseAxis& a : axes.lattices) {
    const int64_t spacing = std::min(sharing.spacing, a.count);
    for (int64_t group = 0, rows; group < a.count; group += rows * spacing) {
      const int64_t left = (a.count - group + spacing - 1) / spacing;
      rows = most > 4 && (left == 8 || left == 9) ? 4 : std::min(left, most);
      for (int64_t q = 0; q < spacing && group + q < a.count; ++q) {
        int64_t first = group + q, count = std::min((a.count - first + spacing - 1) / spacing, rows);
        for (int64_t size; count > 0; count -= size, first += size * spacing) {
          size = count >= 7 ? 7 : count >= 4 ? 4 : 1;
          tiles.push_back({&a, first, size, sharing.spacing, sharing.step, side.dilation});
        }
      }
    }
  }
  return tiles;
}

// How planes are copied.
struct DepthwiseCopies {
  int64_t margin = 0, ring = 1, row = 0;

  DepthwiseCopies(const DepthwiseAxes& rows, const DepthwiseAxes& columns, int64_t spacing) {
    int64_t length = 0;
    for (const DepthwiseAxis& a : columns.lattices)
      for (int64_t t = 0; t < a.taps; ++t) margin = std::max(margin, -a.base[t]);
    for (const DepthwiseAxis& a : columns.lattices)
      for (int64_t t = 0; t < std::max<int64_t>(a.taps, 1); ++t)
        length = std::max(length, (a.taps ? a.base[t] + margin : 0) / a.advance +
                                      (a.count + kMostLanes - 1) / kMostLanes * kMostLanes);
    row = length * columns.lattices[0].advance;
    for (const DepthwiseAxis& a : rows.lattices) {
      if (a.taps == 0) continue;
      const int64_t reach = std::max(a.base[0], a.base[a.taps - 1]) - std::min(a.base[0], a.base[a.taps - 1]);
      ring =
          std::max(ring, std::min(a.source, (kDepthwiseRows * std::min(spacing, a.count) - 1) * a.advance + reach + 1));
    }
  }
};

// Units of work over the threads, each with a piece of scratch of its own.
template <class F> void over_threads(int64_t units, size_t bytes, Scratch& scratch, int64_t workers, F&& run) {
  char* const memory = scratch.take<char>(bytes * size_t(workers));
  for_ranges(units, workers,
             [&](int64_t worker, int64_t first, int64_t last) { run(first, last, memory + bytes * size_t(worker)); });
}
inline int64_t workers_for(int64_t units) { return std::max<int64_t>(1, std::min(units, threads())); }

// Channels of a unit: all of them, or even parts of whole vectors, if that takes more units or less room.
inline int64_t channels_of_unit(int64_t channels, int64_t units, int64_t most) {
  const int64_t wanted = std::max((channels + most - 1) / most, std::min((8 + units - 1) / units, channels / 64));
  if (wanted <= 1) return channels;
  return std::min(channels, ((channels + wanted - 1) / wanted + 31) / 32 * 32);
}
// The last unit is joined with the one before where it is narrower than a vector.
inline int64_t units_of(int64_t channels, int64_t each) {
  return std::max<int64_t>(1, (channels + each - kLeastPixelChannels) / each);
}

// Both axes of one direction, and the tiles of its target rows.
struct DepthwiseCut {
  const DepthwiseAxes rows, columns;
  const DepthwiseSharing sharing;
  const std::vector<DepthwiseTile> tiles;

  DepthwiseCut(const DepthwiseProblem& p, bool gradient, int64_t source_width)
      : rows(axes_of(p.rows, p.kernel, gradient, false)),
        columns(axes_of(p.columns, p.kernel, gradient, true)),
        sharing(p.rows, gradient),
        tiles(tiles_of(rows, p.rows, sharing, tile_rows(p, sharing, source_width))) {}
  DepthwiseCut(const DepthwiseCut&) = delete;  // the tiles point to the rows
};

// What a convolution reads and writes.
struct DepthwiseMaps {
  const Tensor &source, &target;
  DepthwiseMap from, to;
};

inline size_t packed_bytes(const DepthwiseProblem& p) {
  return Scratch::padded(size_t(p.channels * p.kernel * p.kernel * p.arithmetic()));
}

inline void convolve_pixels(const DepthwiseProblem& p, const DepthwiseCut& cut, const DepthwiseMaps& maps,
                            const void* weights, Scratch& scratch) {
  const size_t zero_bytes = size_t(maps.from.width * p.channels * p.element());
  void* const zeros = scratch.take<char>(zero_bytes);
  std::memset(zeros, 0, zero_bytes);
  const int64_t tiles = int64_t(cut.tiles.size()), all = p.images * tiles;
  const int64_t each = channels_of_unit(p.channels, all, 256);
  const int64_t chunks = units_of(p.channels, each);
  const bool streaming = maps.target.numel() * p.element() >= kStreamingBytes && aligned(maps.target) &&
                         p.channels * p.element() % 64 == 0;
  const std::vector<DepthwiseAxis>& lattices = cut.columns.lattices;
  const DepthwisePixels job{p.storage,
                            maps.source.const_data_ptr(),
                            weights,
                            zeros,
                            maps.target.mutable_data_ptr(),
                            maps.from,
                            maps.to,
                            p.kernel,
                            lattices.data(),
                            int64_t(lattices.size()),
                            streaming};
  const auto kernel = NASDET_STORAGE_KERNEL(p.storage, depthwise_pixels);
  for_ranges(all * chunks, threads(), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t c = i / all, t = i % all;
      kernel(job, cut.tiles[size_t(t % tiles)], t / tiles, c * each, c + 1 == chunks ? p.channels : (c + 1) * each);
    }
  });
}

inline size_t plane_bytes(const DepthwiseProblem& p, const DepthwiseCopies& copies, const DepthwiseMap& to) {
  const int64_t elements = (copies.ring + 1) * copies.row + kDepthwiseRows * (to.width + 2 * kMostLanes);
  return Scratch::padded(size_t(elements * p.arithmetic()));
}

inline void convolve_planes(const DepthwiseProblem& p, const DepthwiseCut& cut, const DepthwiseCopies& copies,
                            const DepthwiseMaps& maps, const void* weights, Scratch& scratch, int64_t workers) {
  const std::vector<DepthwiseAxis>& lattices = cut.columns.lattices;
  const DepthwisePlanes job{p.storage,
                            maps.source.const_data_ptr(),
                            weights,
                            maps.target.mutable_data_ptr(),
                            maps.from,
                            maps.to,
                            p.kernel,
                            lattices.data(),
                            int64_t(lattices.size()),
                            cut.tiles.data(),
                            int64_t(cut.tiles.size()),
                            copies.margin,
                            copies.ring,
                            copies.row};
  const auto kernel = NASDET_STORAGE_KERNEL(p.storage, depthwise_planes);
  over_threads(p.images * p.channels, plane_bytes(p, copies, maps.to), scratch, workers,
               [&](int64_t first, int64_t last, void* own) { kernel(job, first, last, own); });
}

// source -> target: the forward, or the gradient of the input.
inline void convolve(const DepthwiseProblem& p, const Tensor& source, const Tensor& weight, const Tensor& target,
                     bool gradient) {
  const DepthwiseCut cut(p, gradient, gradient ? p.columns.out : p.columns.in);
  const DepthwiseMap x{p.channels, p.rows.in, p.columns.in}, y{p.channels, p.rows.out, p.columns.out};
  const DepthwiseMaps maps{source, target, gradient ? y : x, gradient ? x : y};
  const auto pack = [&](void* packed) {
    NASDET_STORAGE_KERNEL(p.storage, depthwise_pack)(p.storage, weight.const_data_ptr(), p.channels, p.kernel,
                                                     turned(p.rows, gradient), turned(p.columns, gradient), p.pixels,
                                                     packed);
  };
  if (p.pixels) {
    Scratch scratch(packed_bytes(p) + Scratch::padded(size_t(maps.from.width * p.channels * p.element())));
    void* const weights = scratch.take<char>(packed_bytes(p));
    pack(weights);
    convolve_pixels(p, cut, maps, weights, scratch);
  } else {
    const DepthwiseCopies copies(cut.rows, cut.columns, cut.sharing.spacing);
    const int64_t workers = workers_for(p.images * p.channels);
    Scratch scratch(packed_bytes(p) + plane_bytes(p, copies, maps.to) * size_t(workers));
    void* const weights = scratch.take<char>(packed_bytes(p));
    pack(weights);
    convolve_planes(p, cut, copies, maps, weights, scratch, workers);
  }
}

inline void correlate_pixels(const DepthwiseProblem& p, DepthwiseGrad job, char* dweight) {
  const int64_t taps = p.kernel * p.kernel, all = p.images * job.tile_count;
  const int64_t parts = std::min(all, kGradParts);
  const int64_t each = channels_of_unit(p.channels, 8, std::max<int64_t>(32, 4096 / taps / 32 * 32));
  const int64_t chunks = units_of(p.channels, each);
  const int64_t units = parts * chunks, workers = workers_for(units), widest = 2 * each;
  const size_t zero_bytes = Scratch::padded(size_t(p.columns.in * p.channels * p.element()));
  const size_t total_bytes = Scratch::padded(size_t(parts * p.channels * taps) * 8);
  const size_t bytes = Scratch::padded(size_t((2 * widest + 2 * kMostLanes) * taps * p.arithmetic()));
  Scratch scratch(zero_bytes + total_bytes + bytes * size_t(workers));
  char* const zeros = scratch.take<char>(zero_bytes);
  double* const totals = reinterpret_cast<double*>(scratch.take<char>(total_bytes));
  std::memset(zeros, 0, zero_bytes);
  std::memset(totals, 0, total_bytes);
  job.zeros = zeros;
  const auto kernel = NASDET_STORAGE_KERNEL(p.storage, depthwise_pixels_grad);
  over_threads(units, bytes, scratch, workers, [&](int64_t first, int64_t last, void* own) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t part = i % parts, c = i / parts, begin = c * each;
      kernel(job, all * part / parts, all * (part + 1) / parts, begin, c + 1 == chunks ? p.channels : begin + each, own,
             totals + (part * p.channels + begin) * taps);
    }
  });
  std::vector<const double*> sums;
  for (int64_t part = 0; part < parts; ++part) sums.push_back(totals + part * p.channels * taps);
  NASDET_STORAGE_KERNEL(p.storage, depthwise_unpack)(p.storage, sums.data(), parts, p.channels * taps, dweight);
}

inline void correlate_planes(const DepthwiseProblem& p, const DepthwiseCut& cut, DepthwiseGrad job, char* dweight) {
  const DepthwiseCopies copies(cut.rows, cut.columns, cut.sharing.spacing);
  job.margin = copies.margin;
  job.ring = copies.ring;
  job.row = copies.row;
  const int64_t taps = p.kernel * p.kernel, workers = workers_for(p.channels);
  const int64_t elements = (copies.ring + 1) * copies.row + kDepthwiseRows * (p.columns.out + kMostLanes);
  const size_t floats = Scratch::padded(size_t((elements + taps * kMostLanes) * p.arithmetic()));
  const size_t bytes = floats + Scratch::padded(size_t(taps) * 8);
  Scratch scratch(bytes * size_t(workers));
  const auto kernel = NASDET_STORAGE_KERNEL(p.storage, depthwise_planes_grad);
  const auto unpack = NASDET_STORAGE_KERNEL(p.storage, depthwise_unpack);
  over_threads(p.channels, bytes, scratch, workers, [&](int64_t first, int64_t last, char* own) {
    double* const total = reinterpret_cast<double*>(own + floats);
    for (int64_t c = first; c < last; ++c) {
      kernel(job, p.images, c, c == first, own, total);
      unpack(p.storage, &total, 1, taps, dweight + c * taps * p.element());
    }
  });
}

// The gradient of the weights.
inline void correlate(const DepthwiseProblem& p, const Tensor& x, const Tensor& grad, const Tensor& dweight) {
  const DepthwiseCut cut(p, false, p.columns.in);
  DepthwiseGrad job{};
  job.storage = p.storage;
  job.source = x.const_data_ptr();
  job.grad = grad.const_data_ptr();
  job.from = {p.channels, p.rows.in, p.columns.in};
  job.to = {p.channels, p.rows.out, p.columns.out};
  job.kernel = p.kernel;
  job.columns = cut.columns.lattices.data();
  job.tiles = cut.tiles.data();
  job.tile_count = int64_t(cut.tiles.size());
  char* const out = static_cast<char*>(dweight.mutable_data_ptr());
  if (p.pixels) correlate_pixels(p, job, out);
  else correlate_planes(p, cut, job, out);
}

}  // namespace
}  // namespace nasdet
