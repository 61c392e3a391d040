// Runs the kernels of roi_align*.cuh on the CPU, as their launcher does, against sample-by-sample sums in double: ordinary,
// degenerate and hostile boxes, both layouts, aligned and unaligned maps, several levels, thread and block orders. Prints
// the number of checks; throws at the first wrong one.
#include "host_shim.h"

#include "roi_align.cuh"
#include "roi_align_gather.cuh"
#include "roi_align_oracle.h"
#include "roi_align_scatter.cuh"

#include <cstdio>
#include <limits>
#include <random>

using namespace nasdet::cuda;

static int checks = 0;
static std::string where;

static void expect(bool right, const std::string& what) {
  ++checks;
  if (!right) throw std::runtime_error(what + " is wrong: " + where);
}

template <class S> double rounding();  // unit roundoff of the storage
template <> double rounding<float>() { return 6e-8; }
template <> double rounding<double>() { return 1.2e-16; }
template <> double rounding<__half>() { return 4.9e-4; }
template <> double rounding<__nv_bfloat16>() { return 3.91e-3; }
// Rounding relative to the sum of the terms' sizes (in double, the comparison's own: up to 1,300 terms), and the smallest step of the storage.
template <class S> constexpr double kArithmetic = sizeof(arithmetic_t<S>) == 8 ? 2e-13 : 4e-6;
template <class S> constexpr double kStep = sizeof(S) == 2 ? 6e-8 : 0;
template <class S> bool close(double actual, double exact, double scale) {
  return std::fabs(actual - exact) <= 1.01 * rounding<S>() * std::fabs(exact) + kArithmetic<S> * scale + kStep<S>;
}
template <class S> double value(S v) { return double(widen<arithmetic_t<S>>(v)); }

// An array that ends where its heap block ends, so that the address sanitizer sees the first element beyond it; all NaN.
template <class S> struct Array {
  int64_t count;
  std::unique_ptr<S[]> memory;
  S* at;
  explicit Array(int64_t n, int64_t offset = 0)
      : count(n), memory(new S[size_t(n + offset)]), at(memory.get() + offset) {
    std::memset(static_cast<void*>(memory.get()), 0xFF, size_t(n + offset) * sizeof(S));
  }
  void clear() { std::memset(static_cast<void*>(at), 0, size_t(count) * sizeof(S)); }
};
template <class S> bool same_bits(const Array<S>& a, const Array<S>& b) {
  return std::memcmp(a.at, b.at, size_t(a.count) * sizeof(S)) == 0;
}

static int64_t index_of(bool nhwc, int64_t n, int64_t c, int64_t h, int64_t w, int64_t channels, int64_t height,
                        int64_t width) {
  return nhwc ? ((n * height + h) * width + w) * channels + c : ((n * channels + c) * height + h) * width + w;
}

template <class T> std::vector<T> boxes(int images, std::mt19937& random) {
  const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
  std::vector<T> rois = {
      0,           10,          12,  90,  70,        1,       -40,  -30,     20,      25,     0,      150,  100, 400,
      300,         1,           0,   0,   215,       159,     0,    50,      60,      40,     30,     1,    33,  44,
      33,          44,          0,   nan, 3,         40,      50,   1,       3,       4,      inf,    50,   0,   -inf,
      4,           50,          inf, 1,   1000,      4,       2000, 9,       0,       -1000,  4,      -500, 90,  1,
      5,           5,           6,   6,   T(images), 1,       2,    9,       9,       T(-1),  1,      2,    30,  40,
      nan,         1,           2,   30,  40,        T(-0.5), 1,    2,       60,      50,     T(0.9), 8,    8,   99,
      24,          0,           -4,  -4,  4,         4,       0,    T(-1e6), T(-2e6), T(3e6), T(1e6), 1,    4,   4,
      T(223.9999), T(223.9999), 1,   212, 156,       220,     164,  0,       16,      16,     32,     48};
  std::uniform_real_distribution<double> place(-20, 180), side(1, 120);
  for (int k = 0; k < 6; ++k) {
    const double x = place(random), y = place(random);
    for (double v : {double(k % images), x, y, x + side(random), y + side(random)}) rois.push_back(T(v));
  }
  return rois;
}

template <class S, int kWidth, bool kNhwc, int kGatherWidth> struct Problem {
  using T = arithmetic_t<S>;
  static constexpr bool nhwc = kNhwc;
  Pyramid p;
  Pooled o;
  std::vector<T> rois;
  int64_t count;
  std::vector<Array<S>> features;
  Array<S> grad;
  RoiMaps<T> maps{};

  Problem(Pyramid pyramid, Pooled pooled, std::mt19937& random)
      : p(pyramid),
        o(pooled),
        rois(boxes<T>(p.images, random)),
        count(int64_t(rois.size() / 5)),
        grad(count * p.channels * o.height * o.width, kWidth == 1) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < grad.count; ++i) grad.at[i] = narrow<S>(T(normal(random)));
    maps.levels = int(p.scales.size()), maps.images = p.images, maps.channels = p.channels;
    maps.pooled_height = o.height;
    maps.pooled_width = o.width;
    maps.sampling_ratio = o.sampling_ratio;
    maps.aligned = o.aligned;
    maps.rule = {o.policy, o.canonical_level, -int(std::lround(std::log2(p.scales.front()))),
                 -int(std::lround(std::log2(p.scales.back()))), o.canonical_scale};
    for (size_t l = 0; l < p.scales.size(); ++l) {
      features.emplace_back(pixels(l) * p.channels, kWidth == 1);
      for (int64_t i = 0; i < features[l].count; ++i) features[l].at[i] = narrow<S>(T(normal(random)));
      maps.map[l] = features[l].at;
      maps.height[l] = p.heights[l];
      maps.width[l] = p.widths[l];
      maps.scale[l] = T(p.scales[l]);
    }
  }
  int64_t pixels(size_t l) const { return int64_t(p.images) * p.heights[l] * p.widths[l]; }

  Array<S> forward(int64_t parts, int64_t most_blocks) const {
    Array<S> out(grad.count, kWidth == 1);
    const int64_t items = int64_t(o.height) * o.width * ((p.channels + kWidth - 1) / kWidth);
    const int64_t share = (items + parts - 1) / parts;
    const int64_t bins = o.height + o.width;
    const int capacity = tap_capacity<T>(bins, o.sampling_ratio);
    shim::launch(dim3(unsigned((items + share - 1) / share), unsigned(std::min(count, most_blocks))), kRoiThreads,
                 size_t(tap_bytes<T>(bins, capacity)), roi_align_forward_kernel<S, kWidth, kNhwc>, maps, rois.data(),
                 out.at, count, int(share), capacity);
    return out;
  }

  std::vector<Array<S>> scatter(int64_t parts, int64_t most_blocks) const {
    std::vector<Array<S>> results;
    std::vector<Array<T>> sums;
    RoiMaps<T> to = maps;
    RoiSums rounding_of{};
    for (size_t l = 0; l < p.scales.size(); ++l) {
      sums.emplace_back(pixels(l) * p.channels), results.emplace_back(pixels(l) * p.channels);
      sums[l].clear();
      to.grad[l] = sums[l].at, rounding_of.to[l] = results[l].at, rounding_of.count[l] = results[l].count;
      if constexpr (sizeof(T) == 4) rounding_of.from[l] = sums[l].at;
    }
    const int64_t groups = (p.channels + kWidth - 1) / kWidth, share = (groups + parts - 1) / parts;
    shim::launch(dim3(unsigned((groups + share - 1) / share), unsigned(std::min(count, most_blocks))), kRoiThreads,
                 size_t(scatter_bytes<T>(o.height, o.width)), roi_align_scatter_kernel<S, kWidth, kNhwc>, to,
                 rois.data(), static_cast<const S*>(grad.at), count, int(share));
    if constexpr (sizeof(S) == 2) {
      shim::launch(dim3(2, unsigned(p.scales.size())), kRoiThreads, 0, roi_align_round_kernel<S>, rounding_of);
    } else {
      for (size_t l = 0; l < results.size(); ++l)
        std::memcpy(results[l].at, sums[l].at, size_t(results[l].count) * sizeof(S));
    }
    return results;
  }

  std::vector<Array<S>> gather(int most_hits, int64_t most_blocks) const {
    std::vector<Array<S>> results;
    RoiMaps<T> to = maps;
    for (size_t l = 0; l < p.scales.size(); ++l) {
      results.emplace_back(pixels(l) * p.channels, kGatherWidth == 1);
      to.grad[l] = results[l].at;
      to.first_tile[l + 1] = to.first_tile[l] + tiles_of<kNhwc>(p.images, p.heights[l], p.widths[l]);
    }
    std::unique_ptr<Footprint[]> footprints(new Footprint[size_t(count)]);
    shim::launch(1, kRoiThreads, 0, roi_align_footprint_kernel<T>, to, rois.data(), footprints.get(), count);
    const int64_t tiles = to.first_tile[p.scales.size()];
    const int hits = std::min(most_hits, gather_hits<T, kNhwc>(o.height, o.width));
    const int block = kGatherWidth * kGatherLanes<kNhwc>;
    shim::launch(dim3(unsigned((p.channels + block - 1) / block), unsigned(std::min(tiles, most_blocks))), kRoiThreads,
                 size_t(hits * gather_bytes_per_hit<T, kNhwc>(o.height, o.width)),
                 roi_align_gather_kernel<S, kGatherWidth, kNhwc>, to, rois.data(),
                 static_cast<const Footprint*>(footprints.get()), static_cast<const S*>(grad.at), count, tiles, hits);
    return results;
  }
};

template <class P> void check_forward(const P& problem) {
  using S = std::remove_reference_t<decltype(*problem.grad.at)>;
  const auto [height, width, channels] = std::tuple(problem.o.height, problem.o.width, problem.p.channels);
  std::vector<double> exact(size_t(problem.grad.count)), scale(exact.size());
  oracle(problem.p, problem.o, problem.rois,
         [&](int level, int image, size_t k, int i, int j, int row, int col, double weight) {
           for (int c = 0; c < channels; ++c) {
             const size_t to = size_t(index_of(problem.nhwc, int64_t(k), c, i, j, channels, height, width)),
                          l = size_t(level);
             const double v = value(problem.features[l].at[index_of(problem.nhwc, image, c, row, col, channels,
                                                                    problem.p.heights[l], problem.p.widths[l])]);
             exact[to] += weight * v, scale[to] += std::fabs(weight * v);
           }
         });
  shim::reverse = true;
  const auto out = problem.forward(1, 1 << 20);
  for (size_t i = 0; i < exact.size(); ++i) expect(close<S>(value(out.at[i]), exact[i], scale[i]), "a pooled value");
  shim::reverse = false;  // thread 0 goes first, and on few blocks would overwrite the place of a RoI in use
  expect(same_bits(out, problem.forward(3, 5)), "the pooling in the other thread order, in three parts on few blocks");
}

template <class P> void check_backward(const P& problem) {
  using S = std::remove_reference_t<decltype(*problem.grad.at)>;
  const int channels = problem.p.channels;
  std::vector<std::vector<double>> exact, scale;
  for (const auto& map : problem.features) exact.emplace_back(size_t(map.count)), scale.emplace_back(size_t(map.count));
  oracle(
      problem.p, problem.o, problem.rois,
      [&](int level, int image, size_t k, int i, int j, int row, int col, double weight) {
        const size_t l = size_t(level);
        for (int c = 0; c < channels; ++c) {
          const size_t to =
              size_t(index_of(problem.nhwc, image, c, row, col, channels, problem.p.heights[l], problem.p.widths[l]));
          const double v =
              value(problem.grad
                        .at[index_of(problem.nhwc, int64_t(k), c, i, j, channels, problem.o.height, problem.o.width)]);
          exact[l][to] += weight * v, scale[l][to] += std::fabs(weight * v);
        }
      });
  const auto compare = [&](const auto& results, const char* what) {
    for (size_t l = 0; l < results.size(); ++l)
      for (size_t i = 0; i < exact[l].size(); ++i)
        expect(close<S>(value(results[l].at[i]), exact[l][i], scale[l][i]), what);
  };
  shim::reverse = false;
  const auto gathered = problem.gather(kMostHits, 1 << 20);
  compare(gathered, "a gathered gradient");
  compare(problem.scatter(1, 1 << 20), "a scattered gradient");
  shim::reverse = true;
  const auto again = problem.gather(3, 5);
  for (size_t l = 0; l < gathered.size(); ++l)
    expect(same_bits(gathered[l], again[l]),
           "the gathered gradient in reverse thread order, few RoIs at a time on few blocks");
  compare(problem.scatter(2, 5), "a gradient scattered in reverse thread order, in two parts on few blocks");
}

template <class S, int kWidth, bool kNhwc, int kGatherWidth> void check_layout(const char* type, int channels) {
  const Pyramid three{2, channels, {20, 10, 5}, {27, 14, 7}, {0.125, 0.0625, 0.03125}},
      one{2, channels, {37}, {80}, {0.25}}, single_pixel{2, channels, {1}, {1}, {0.03125}};
  const Pyramid empty{2, channels, {0, 3}, {4, 2}, {0.25, 0.125}},
      coarse{2, channels, {5, 3}, {7, 4}, {0.03125, 0.015625}};
  struct {
    const char* name;
    Pyramid p;
    Pooled o;
  } const rows[] = {
      {"three levels, 7x7", three, {7, 7, 2, false, 0, 4, 112}},
      {"three levels, adaptive", three, {3, 2, 0, true, 1, 4, 112}},
      {"one level, adaptive, more taps than fit", one, {1, 2, 0, false, 0, 4, 224}},
      {"one level, more samples than taps", one, {2, 1, 18, true, 0, 4, 224}},
      {"one pixel", single_pixel, {2, 2, 2, false, 0, 4, 224}},
      {"a level without pixels", empty, {2, 3, 0, true, 0, 4, 224}},
      {"more bins than a table", coarse, {35, 3, 1, true, 0, 5, 112}},
  };
  std::mt19937 random(0);
  for (const auto& row : rows) {
    where = std::string(type) + (kNhwc ? ", NHWC, " : ", NCHW, ") + std::to_string(channels) + " channels, " + row.name;
    const Problem<S, kWidth, kNhwc, kGatherWidth> problem(row.p, row.o, random);
    check_forward(problem);
    check_backward(problem);
  }
}

template <class S> void check_storage(const char* type) {
  constexpr int kGroup = sizeof(S) == 8 ? 2 : 4, kPlanes = sizeof(S) == 8 ? 8 : 16;
  // The 16-bit types differ in their conversions alone: they share the widths.
  if constexpr (sizeof(S) > 2) check_layout<S, kGroup, true, kGroup>(type, 2 * kGroup);
  else check_layout<S, kWide<S>, true, kGroup>(type, 2 * kWide<S>);
  if constexpr (!std::is_same_v<S, __half>) check_layout<S, 1, true, 1>(type, 3);
  if constexpr (!std::is_same_v<S, __nv_bfloat16>) check_layout<S, 4, false, kPlanes>(type, 5);
}

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "float") check_storage<float>("float");
  if (only.empty() || only == "double") check_storage<double>("double");
  if (only.empty() || only == "half") check_storage<__half>("half");
  if (only.empty() || only == "bfloat16") check_storage<__nv_bfloat16>("bfloat16");
  std::printf("%d checks\n", checks);
}
