// Runs the kernels of mix.cuh on the CPU, as their launcher does, against sums in double: odd sizes, aligned and unaligned
// maps, more maps than a launch takes, zero weights, both thread orders. Prints the number of checks; throws at the first wrong one.
#include "host_shim.h"
#include "mix.cuh"

#include <cstdio>
#include <limits>
#include <random>

using namespace nasdet::cuda;

static int checks = 0;

static void expect(bool right, const char* what, const char* type, int64_t count, int maps) {
  ++checks;
  if (!right)
    throw std::runtime_error(std::string(what) + " is wrong: " + type + ", count " + std::to_string(count) + ", maps " +
                             std::to_string(maps));
}

template <class S> double rounding();  // unit roundoff of the storage
template <> double rounding<float>() { return 6e-8; }
template <> double rounding<double>() { return 1.2e-16; }
template <> double rounding<__half>() { return 4.9e-4; }
template <> double rounding<__nv_bfloat16>() { return 3.91e-3; }
template <class S> double value(S v) { return double(widen<arithmetic_t<S>>(v)); }

// An array that ends where its heap block ends, so that the address sanitizer sees the first element beyond it.
template <class S> struct Array {
  std::unique_ptr<S[]> memory;
  S* at;
  Array(int64_t count, int64_t offset) : memory(new S[size_t(count + offset)]), at(memory.get() + offset) {
    std::memset(static_cast<void*>(memory.get()), 0xFF, size_t(count + offset) * sizeof(S));
  }
};

template <class S, int kWidth> struct Problem {
  using T = arithmetic_t<S>;
  int64_t count;
  int total;
  std::vector<Array<S>> xs;
  Array<S> grad;
  std::vector<T> weights;

  // One weight is 0 and its map is all NaN: the forward kernel must not read it.
  Problem(int64_t n, int maps, bool zero, std::mt19937& random)
      : count(n), total(maps), grad(n, kWidth == 1), weights(size_t(maps)) {
    std::normal_distribution<double> normal;
    for (int p = 0; p < maps; ++p) {
      xs.emplace_back(n, kWidth == 1);
      weights[size_t(p)] = T(zero && p == maps / 2 ? 0 : normal(random) + 2);
      if (weights[size_t(p)] != 0)
        for (int64_t i = 0; i < n; ++i) xs.back().at[i] = narrow<S>(T(normal(random)));
    }
    for (int64_t i = 0; i < n; ++i) grad.at[i] = narrow<S>(T(normal(random)));
  }

  MixMaps group(int first, const std::vector<Array<S>>* dxs) const {
    MixMaps maps{};
    maps.maps = total - first < kMaxMaps ? total - first : kMaxMaps;
    for (int p = 0; p < maps.maps; ++p) {
      maps.x[p] = xs[size_t(first + p)].at;
      if (dxs) maps.dx[p] = (*dxs)[size_t(first + p)].at;
    }
    return maps;
  }

  Array<S> forward(int64_t most_blocks) const {
    Array<S> out(count, kWidth == 1);
    std::vector<T> carry(size_t(total > kMaxMaps ? count : 0));
    const unsigned blocks = unsigned(blocks_for(count / kWidth, kForwardPacks, most_blocks));
    for (int first = 0; first < total; first += kMaxMaps)
      shim::launch(blocks, kThreads, 0, mix_forward_kernel<S, kWidth>, group(first, nullptr), weights.data() + first,
                   out.at, static_cast<const T*>(first ? carry.data() : nullptr),
                   first + kMaxMaps < total ? carry.data() : nullptr, count);
    return out;
  }

  std::vector<T> backward(std::vector<Array<S>>& dxs, bool need_xs, bool need_weights, int64_t most_blocks) const {
    const unsigned blocks = unsigned(blocks_for(count / kWidth, kBackwardPacks, most_blocks));
    std::vector<T> partial(size_t(total) * blocks, std::numeric_limits<T>::quiet_NaN()), sums(size_t(total), T(0));
    for (int first = 0; first < total; first += kMaxMaps) {
      const MixMaps maps = group(first, need_xs ? &dxs : nullptr);
      shim::launch(dim3(blocks, unsigned((maps.maps + kGroup - 1) / kGroup)), kThreads, 0,
                   mix_backward_kernel<S, kWidth>, maps, weights.data() + first, static_cast<const S*>(grad.at),
                   need_weights ? partial.data() + int64_t(first) * blocks : nullptr, need_xs, count);
    }
    if (need_weights)
      shim::launch(unsigned(total), kThreads, 0, mix_reduce_kernel<T>, static_cast<const T*>(partial.data()),
                   sums.data(), int64_t(blocks));
    return sums;
  }
};

template <class S> bool same_bits(const S* a, const S* b, int64_t count) {
  return std::memcmp(a, b, size_t(count) * sizeof(S)) == 0;
}

template <class S, int kWidth>
void check_forward(const Problem<S, kWidth>& problem, const char* type, int64_t most_blocks) {
  const int64_t count = problem.count;
  shim::reverse = false;
  const Array<S> out = problem.forward(most_blocks);
  shim::reverse = true;
  const Array<S> again = problem.forward(most_blocks);
  expect(same_bits(out.at, again.at, count), "the sum in reverse thread order", type, count, problem.total);
  double arithmetic = sizeof(arithmetic_t<S>) == 8 ? 1.2e-16 : 6e-8;
  for (int64_t i = 0; i < count; ++i) {
    double exact = 0, scale = 0;
    for (int p = 0; p < problem.total; ++p)
      if (const double w = problem.weights[size_t(p)]; w != 0)
        exact += w * value(problem.xs[size_t(p)].at[i]), scale += std::fabs(w * value(problem.xs[size_t(p)].at[i]));
    expect(std::fabs(value(out.at[i]) - exact) <=
               1.01 * rounding<S>() * std::fabs(exact) + 2 * problem.total * arithmetic * scale + 1e-7 * rounding<S>(),
           "a sum", type, count, problem.total);
  }
}

template <class S, int kWidth>
void check_backward(const Problem<S, kWidth>& problem, const char* type, bool need_xs, bool need_weights,
                    int64_t most_blocks) {
  using T = arithmetic_t<S>;
  const int64_t count = problem.count;
  std::vector<Array<S>> dxs, others;
  for (int p = 0; p < problem.total; ++p) dxs.emplace_back(count, kWidth == 1), others.emplace_back(count, kWidth == 1);
  shim::reverse = false;
  const std::vector<T> dw = problem.backward(dxs, need_xs, need_weights, most_blocks);
  shim::reverse = true;
  const std::vector<T> again = problem.backward(others, need_xs, need_weights, most_blocks);
  expect(same_bits(dw.data(), again.data(), problem.total), "the weights' gradient in reverse thread order", type,
         count, problem.total);
  for (int p = 0; p < problem.total; ++p) {
    double exact = 0, scale = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double g = value(problem.grad.at[i]);
      exact += g * value(problem.xs[size_t(p)].at[i]), scale += std::fabs(g * value(problem.xs[size_t(p)].at[i]));
      if (!need_xs) continue;
      const double dx = double(problem.weights[size_t(p)]) * g;
      expect(std::fabs(value(dxs[size_t(p)].at[i]) - dx) <= 1.01 * rounding<S>() * std::fabs(dx) + 1e-7,
             "a map's gradient", type, count, problem.total);
    }
    if (need_xs)
      expect(same_bits(dxs[size_t(p)].at, others[size_t(p)].at, count), "a map's gradient in reverse thread order",
             type, count, problem.total);
    if (need_weights)
      expect(std::fabs(double(dw[size_t(p)]) - exact) <= (sizeof(T) == 8 ? 1e-14 : 1e-6) * (1 + scale),
             "a weight's gradient", type, count, problem.total);
  }
}

template <class S, int kWidth> void check_all(const char* type) {
  std::mt19937 random(0);
  const int64_t pack = kWidth, block = pack * kThreads;
  struct {
    int64_t count;
    int maps;
    int64_t most_blocks;
  } const sizes[] = {{1, 1, 1000},
                     {pack - 1 + (pack == 1), 3, 1000},
                     {pack * 31 + 1, 9, 1000},
                     {block, 2, 1000},
                     {pack * 33 + 1, kWidth == 4 ? kMaxMaps + 3 : 2, 1000},
                     {2 * block + pack + 3, 3, 1},
                     {3 * block + pack - 1, 5, 2}};
  for (const auto& size : sizes) {
    check_forward(Problem<S, kWidth>(size.count, size.maps, size.maps > 2, random), type, size.most_blocks);
    const Problem<S, kWidth> problem(size.count, size.maps, false, random);
    check_backward(problem, type, true, true, size.most_blocks);
    if (size.maps == 3) {
      check_backward(problem, type, true, false, size.most_blocks);
      check_backward(problem, type, false, true, size.most_blocks);
    }
  }
}

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "float")
    check_all<float, kWide<float>>("float, packs"), check_all<float, 1>("float, elements");
  if (only.empty() || only == "double")
    check_all<double, kWide<double>>("double, packs"), check_all<double, 1>("double, elements");
  if (only.empty() || only == "half")
    check_all<__half, kWide<__half>>("half, packs"), check_all<__half, 1>("half, elements");
  if (only.empty() || only == "bfloat16")
    check_all<__nv_bfloat16, kWide<__nv_bfloat16>>("bfloat16, packs"),
        check_all<__nv_bfloat16, 1>("bfloat16, elements");
  std::printf("%d checks\n", checks);
}
