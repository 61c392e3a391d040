// RoIAlign and its gradient sample by sample, as torchvision's documentation and tests pin them down, in a few loops: what
// the kernels of roi_align*.cuh are compared with. Positions in the kernels' arithmetic (T), sums in double.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

struct Pyramid {
  int images, channels;
  std::vector<int> heights, widths;
  std::vector<double> scales;
};

struct Pooled {
  int height, width, sampling_ratio;
  bool aligned;
  int policy, canonical_level;
  float canonical_scale;
};

template <class T> int oracle_level(const T* roi, const Pyramid& p, const Pooled& o) {
  if (p.scales.size() == 1) return 0;
  const T area = (roi[3] - roi[1]) * (roi[4] - roi[2]);
  if (!(area >= 0)) return 0;
  const T s = std::sqrt(area) / T(o.canonical_scale);
  const T level = o.policy == 0 ? std::floor(T(o.canonical_level) + std::log2(s) + T(1e-6))
                                : std::floor(T(o.canonical_level) + std::log2(s + T(1e-8)));
  const double k_min = -std::round(std::log2(p.scales.front())), k_max = -std::round(std::log2(p.scales.back()));
  return int(std::fmin(std::fmax(double(level), k_min), k_max) - k_min);
}

struct Corner {
  int at;
  double weight;
};

// The corners of every sample of one bin on one axis, weights not yet divided by the number of samples.
template <class T>
std::vector<std::vector<Corner>> oracle_axis(T low, T high, T scale, int pooled, int sampling_ratio, bool aligned,
                                             int size, double* samples) {
  const T offset = aligned ? T(0.5) : T(0), start = low * scale - offset;
  T length = high * scale - offset - start;
  if (!aligned && length < 1) length = 1;
  const T bin = length / T(pooled), adaptive = std::ceil(bin);
  const int64_t grid = sampling_ratio > 0                           ? sampling_ratio
                       : adaptive > 0 && adaptive < T(2147483648.0) ? int64_t(adaptive)
                                                                    : 0;
  *samples = double(grid);
  std::vector<std::vector<Corner>> bins(static_cast<size_t>(pooled));
  for (int b = 0; b < pooled; ++b) {
    const T edge = start + T(b) * bin;
    for (int64_t s = 0; s < grid; ++s) {
      const T at = edge + (T(s) + T(0.5)) * bin / T(grid);
      if (grid > 100000 && at > T(size)) break;  // positions only rise from here
      if (!(at >= -1 && at <= T(size)) || size == 0) continue;
      const T inside = at < 0 ? T(0) : at;
      const int first = int(inside);
      if (first >= size - 1) bins[size_t(b)].push_back({size - 1, 1});
      else
        bins[size_t(b)].push_back({first, 1 - double(inside - T(first))}),
            bins[size_t(b)].push_back({first + 1, double(inside - T(first))});
    }
  }
  return bins;
}

// visit(level, image, k, bin row, bin column, pixel row, pixel column, weight) for everything that RoI k reads.
template <class T, class Visit>
void oracle(const Pyramid& p, const Pooled& o, const std::vector<T>& rois, Visit visit) {
  for (size_t k = 0; k < rois.size() / 5; ++k) {
    const T* roi = rois.data() + 5 * k;
    if (!(roi[0] > -1 && roi[0] < p.images)) continue;
    const int level = oracle_level(roi, p, o);
    const T scale = T(p.scales[size_t(level)]);
    double y_samples, x_samples;
    const auto ys =
        oracle_axis(roi[2], roi[4], scale, o.height, o.sampling_ratio, o.aligned, p.heights[size_t(level)], &y_samples);
    const auto xs =
        oracle_axis(roi[1], roi[3], scale, o.width, o.sampling_ratio, o.aligned, p.widths[size_t(level)], &x_samples);
    for (int i = 0; i < o.height; ++i)
      for (int j = 0; j < o.width; ++j)
        for (const Corner& y : ys[size_t(i)])
          for (const Corner& x : xs[size_t(j)])
            visit(level, int(roi[0]), k, i, j, y.at, x.at, y.weight * x.weight / (y_samples * x_samples));
  }
}
