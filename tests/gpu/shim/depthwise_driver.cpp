// Runs the kernels of depthwise_conv2d*.cuh on the CPU, as their launcher does, against sums in double: both layouts, widths of
// packs, kernels, strides, dilations, paddings, thread and block orders. Prints the number of checks; throws at the first wrong one.
#include "host_shim.h"

#include "depthwise_conv2d.cuh"
#include "depthwise_conv2d_weights.cuh"

#include <cstdio>
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
template <class S> double value(S v) { return double(widen<arithmetic_t<S>>(v)); }
template <class S> bool close(double actual, double exact, double scale) {
  const double arithmetic = sizeof(arithmetic_t<S>) == 8 ? 1e-14 : 4e-6, step = sizeof(S) == 2 ? 6e-8 : 0;
  return std::fabs(actual - exact) <= 1.01 * rounding<S>() * std::fabs(exact) + arithmetic * scale + step;
}

// An array that ends where its heap block ends, so that the address sanitizer sees the first element beyond it; all NaN.
template <class S> struct Array {
  size_t count;
  std::unique_ptr<S[]> at;
  explicit Array(int64_t n) : count(size_t(n)), at(new S[size_t(n)]) {
    std::memset(static_cast<void*>(at.get()), 0xFF, count * sizeof(S));
  }
  void draw(std::mt19937& random) {
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < count; ++i) at[i] = narrow<S>(arithmetic_t<S>(normal(random)));
  }
};
template <class S> bool same_bits(const Array<S>& a, const Array<S>& b) {
  return std::memcmp(a.at.get(), b.at.get(), a.count * sizeof(S)) == 0;
}

struct Side { int size, stride, padding, dilation; };
struct Shape {
  const char* name;
  int images, kernel;
  Side rows, columns;
};

// How a map's runs lie (as the launcher's step_of); 0: the general kernels.
static int step_of(DepthwiseMaps& m, bool nhwc, bool general) {
  const DepthwiseLine& line = nhwc ? m.columns : m.rows;
  int common = line.dilation;
  while (line.stride % common || line.dilation % common) --common;
  const bool fast = !general && !m.adjoint && line.stride / common <= 2;
  m.spacing = fast        ? std::min(line.dilation / common, line.target)
              : m.adjoint ? std::min(m.columns.stride, m.columns.target)
                          : 1;
  m.runs = runs_of(fast ? line.target : m.columns.target, m.spacing);
  return fast ? line.stride / common : 0;
}

template <class S, int kWidth, bool kNhwc> struct Problem {
  using T = arithmetic_t<S>;
  int channels;
  DepthwiseMaps maps{};
  Array<S> x, weight, grad;

  static DepthwiseLine line(const Side& s, int kernel) {
    return {s.size, (s.size + 2 * s.padding - s.dilation * (kernel - 1) - 1) / s.stride + 1, s.stride, s.padding,
            s.dilation};
  }
  Problem(const Shape& shape, int channels_, std::mt19937& random)
      : channels(channels_),
        x(int64_t(shape.images) * channels * shape.rows.size * shape.columns.size),
        weight(int64_t(channels) * shape.kernel * shape.kernel),
        grad(int64_t(shape.images) * channels * line(shape.rows, shape.kernel).target *
             line(shape.columns, shape.kernel).target) {
    maps.images = shape.images, maps.channels = channels, maps.kernel = shape.kernel;
    maps.rows = line(shape.rows, shape.kernel), maps.columns = line(shape.columns, shape.kernel);
    x.draw(random), weight.draw(random), grad.draw(random);
  }
  int64_t index(int64_t n, int64_t c, int64_t i, int64_t j, int64_t height, int64_t width) const {
    return kNhwc ? ((n * height + i) * width + j) * channels + c : ((n * channels + c) * height + i) * width + j;
  }
  // Calls f(index in x, in weight, in grad) for every product of the convolution.
  template <class F> void products(F f) const {
    const DepthwiseLine &r = maps.rows, &c = maps.columns;
    for (int64_t n = 0; n < maps.images; ++n)
      for (int ch = 0; ch < channels; ++ch)
        for (int i = 0; i < r.target; ++i)
          for (int u = 0; u < maps.kernel; ++u) {
            const int row = i * r.stride - r.padding + u * r.dilation;
            if (row < 0 || row >= r.source) continue;
            for (int j = 0; j < c.target; ++j)
              for (int v = 0; v < maps.kernel; ++v) {
                const int column = j * c.stride - c.padding + v * c.dilation;
                if (column >= 0 && column < c.source)
                  f(size_t(index(n, ch, row, column, r.source, c.source)),
                    size_t((ch * maps.kernel + u) * maps.kernel + v), size_t(index(n, ch, i, j, r.target, c.target)));
              }
          }
  }

  template <int kKernel>
  Array<S> convolve(DepthwiseMaps m, const Array<S>& from, int64_t count, bool general, unsigned blocks) const {
    Array<S> to(count);
    const S *source = from.at.get(), *kernels = weight.at.get();
    S* target = to.at.get();
    const int step = step_of(m, kNhwc, general || kKernel == 0);
    if constexpr (kKernel > 0) {
      const auto fast = [&](auto step_) {
        constexpr int kStep = decltype(step_)::value;
        if constexpr (kNhwc)
          shim::launch(dim3(blocks, unsigned((channels + kChunk<kWidth> - 1) / kChunk<kWidth>)), kDepthwiseThreads, 0,
                       depthwise_pixels_kernel<S, kWidth, kKernel, kStep>, m, source, kernels, target);
        else
          shim::launch(blocks, kDepthwiseThreads, 0, depthwise_planes_kernel<S, kKernel, kStep>, m, source, kernels,
                       target);
      };
      if (step == 1) return fast(std::integral_constant<int, 1>{}), std::move(to);
      if (step == 2) return fast(std::integral_constant<int, 2>{}), std::move(to);
    }
    shim::launch(blocks, kDepthwiseThreads, 0, depthwise_gather_kernel<S, kWidth, kNhwc>, m, source, kernels, target);
    return to;
  }

  template <int kKernel> Array<S> correlate(bool general, unsigned parts) const {
    DepthwiseMaps m = maps;
    Array<S> out(int64_t(weight.count));
    const S *source = x.at.get(), *upstream = grad.at.get();
    const int step = step_of(m, kNhwc, general || kKernel == 0);
    if constexpr (kKernel > 0) {
      if (step > 0) {
        Array<T> partial(int64_t(parts) * int64_t(weight.count));
        T* sums = partial.at.get();
        const auto fast = [&](auto step_) {
          constexpr int kStep = decltype(step_)::value;
          if constexpr (kNhwc)
            shim::launch(dim3(parts, unsigned((channels + kChunk<kWidth> - 1) / kChunk<kWidth>)),
                         (kPixelGradThreads<kWidth, kKernel>), 0,
                         depthwise_pixels_weights_kernel<S, kWidth, kKernel, kStep>, m, source, upstream, sums);
          else
            shim::launch(dim3(unsigned(std::min(channels, 3)), parts), kPlaneGradThreads, 0,
                         depthwise_planes_weights_kernel<S, kKernel, kStep>, m, source, upstream, sums);
        };
        if (step == 1) fast(std::integral_constant<int, 1>{});
        else fast(std::integral_constant<int, 2>{});
        shim::launch(2, kDepthwiseThreads, 0, depthwise_sum_parts_kernel<S>, static_cast<const T*>(sums),
                     int64_t(parts), int64_t(weight.count), out.at.get());
        return out;
      }
    }
    shim::launch(7, kDepthwiseThreads, 0, depthwise_any_weights_kernel<S, kNhwc>, m, source, upstream, out.at.get());
    return out;
  }

  DepthwiseMaps adjoint() const {
    DepthwiseMaps m = maps;
    const bool strided = m.rows.stride > 1 || m.columns.stride > 1;
    for (DepthwiseLine* l : {&m.rows, &m.columns}) {
      std::swap(l->source, l->target);
      if (!strided) l->padding = l->dilation * (m.kernel - 1) - l->padding;
    }
    m.adjoint = strided, m.turned = !strided;
    return m;
  }

  template <int kKernel> void check(bool general) const {
    std::vector<double> y(grad.count), dx(x.count), dw(weight.count), y_scale(y.size()), dx_scale(dx.size()),
        dw_scale(dw.size());
    products([&](size_t a, size_t w, size_t g) {
      const double xa = value(x.at[a]), ww = value(weight.at[w]), gg = value(grad.at[g]);
      y[g] += xa * ww, y_scale[g] += std::fabs(xa * ww);
      dx[a] += gg * ww, dx_scale[a] += std::fabs(gg * ww);
      dw[w] += gg * xa, dw_scale[w] += std::fabs(gg * xa);
    });
    const auto compare = [&](const Array<S>& got, const std::vector<double>& exact, const std::vector<double>& scale,
                             const char* what) {
      for (size_t i = 0; i < got.count; ++i) expect(close<S>(value(got.at[i]), exact[i], scale[i]), what);
    };
    shim::reverse = false;
    const Array<S> result = convolve<kKernel>(maps, x, int64_t(grad.count), general, 3),
                   gradient = convolve<kKernel>(adjoint(), grad, int64_t(x.count), general, 3);
    const Array<S> weights = correlate<kKernel>(general, 3);
    compare(result, y, y_scale, "a value"), compare(gradient, dx, dx_scale, "a gradient"),
        compare(weights, dw, dw_scale, "a weight's gradient");
    shim::reverse = true;
    expect(same_bits(result, convolve<kKernel>(maps, x, int64_t(grad.count), general, 1)),
           "the result in the other thread order on one block");
    expect(same_bits(gradient, convolve<kKernel>(adjoint(), grad, int64_t(x.count), general, 1)),
           "the gradient in the other thread order on one block");
    expect(same_bits(weights, correlate<kKernel>(general, 3)), "the weights' gradient in the other thread order");
    compare(correlate<kKernel>(general, 1), dw, dw_scale, "a weight's gradient in one part");
  }
};

template <class S, int kWidth, bool kNhwc> void check_layout(const char* type, int channels) {
  const Shape shapes[] = {
      {"3x3", 2, 3, {9, 1, 1, 1}, {11, 1, 1, 1}},
      {"5x5, dilation 2 and 3", 1, 5, {11, 1, 4, 2}, {13, 1, 6, 3}},
      {"7x7, stride 2", 1, 7, {9, 2, 3, 1}, {14, 2, 3, 1}},
      {"3x3, stride 2, dilation 3", 2, 3, {8, 2, 3, 3}, {13, 2, 3, 3}},
      {"5x5, stride 2 and 1, dilation 2", 1, 5, {12, 2, 4, 2}, {9, 1, 4, 2}},
      {"3x3, stride 3", 1, 3, {10, 3, 1, 1}, {8, 3, 1, 1}},
      {"3x3, no padding", 1, 3, {6, 1, 0, 1}, {7, 1, 0, 1}},
      {"3x3, wide padding", 1, 3, {4, 1, 5, 1}, {3, 1, 4, 1}},
      {"3x3, dilation beyond the map", 1, 3, {4, 1, 9, 9}, {5, 1, 9, 9}},
      {"1x1, stride beyond the kernel", 2, 1, {5, 3, 0, 1}, {6, 2, 0, 1}},
      {"no images", 0, 3, {4, 1, 1, 1}, {5, 1, 1, 1}},
  };
  std::mt19937 random(0);
  for (const Shape& shape : shapes) {
    const bool fast = sizeof(S) <= 4 && kWidth * sizeof(S) >= (kNhwc ? 4 : 1) && shape.kernel > 1 &&
                      (kNhwc ? shape.columns : shape.rows).stride < 3;
    where = std::string(type) + (kNhwc ? ", NHWC, packs of " : ", NCHW, packs of ") + std::to_string(kWidth) + ", " +
            shape.name;
    const Problem<S, kWidth, kNhwc> problem(shape, fast ? channels : kWidth,
                                            random);  // the general sums take many barriers a weight
    if constexpr (sizeof(S) <= 4 && kWidth * sizeof(S) >= (kNhwc ? 4 : 1)) {
      if (shape.kernel == 3) problem.template check<3>(false);
      else if (shape.kernel == 5) problem.template check<5>(false);
      else if (shape.kernel == 7) problem.template check<7>(false);
      else problem.template check<0>(true);
    } else {
      problem.template check<0>(true);
    }
  }
}

// The 16-bit types differ in their conversions alone: they share the widths.
int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "float")
    check_layout<float, 4, true>("float", 12), check_layout<float, 1, true>("float", 35),
        check_layout<float, 1, false>("float", 3);
  if (only.empty() || only == "double")
    check_layout<double, 2, true>("double", 2), check_layout<double, 1, false>("double", 1);
  if (only.empty() || only == "half")
    check_layout<__half, 2, true>("half", 70), check_layout<__half, 1, true>("half", 1),
        check_layout<__half, 1, false>("half", 3);
  if (only.empty() || only == "bfloat16") check_layout<__nv_bfloat16, 8, true>("bfloat16", 24);
  std::printf("%d checks\n", checks);
}
