// y = sum_p w_p x_p and its gradients: every map is read once, every result written once.
#include "nasdet/isa.h"
#include "nasdet/simd.h"

namespace nasdet {

struct MixArgs {
  const void* const* xs;  // [maps] dense in one layout
  const void* weights;    // [maps] float, or double when the maps are double
  const void* grad;       // backward only, laid out as the maps
  void* const* dxs;       // backward only: [maps], or null when not wanted
  void* out;
  int64_t maps;
  int storage;     // storage_code()
  bool streaming;  // results are larger than the caches and aligned: bypass them
};

}  // namespace nasdet

NASDET_DECLARE_KERNEL(void, mix_forward, const MixArgs&, int64_t begin, int64_t end)
NASDET_DECLARE_KERNEL(void, mix_backward, const MixArgs&, int64_t begin, int64_t end, double* dweights)

namespace nasdet::NASDET_ISA {
namespace {

// All maps are read side by side, a cache line or few of each in turn: on one core that many streams draw about twice the
// bandwidth of one map after another. What the loops need of the arguments is copied first: reading it behind the
// stores of each turn costs 7 %.

template <class S, bool kStreaming> void forward(const MixArgs& a, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>, kUnroll = sizeof(S) == 2 ? 8 : 64 / (W * int(sizeof(S)));
  const T* w = static_cast<const T*>(a.weights);
  S* out = static_cast<S*>(a.out);
  const void* const* xs = a.xs;
  const int64_t maps = a.maps;
  int64_t i = begin;
  for (; i + kUnroll * W <= end; i += kUnroll * W) {
    vec<T> sum[kUnroll] = {};
#pragma GCC unroll 4
    for (int64_t p = 0; p < maps; ++p) {
      const S* x = static_cast<const S*>(xs[p]) + i;
      const vec<T> wp = splat<T>(w[p]);
      for (int u = 0; u < kUnroll; ++u) sum[u] += wp * load(x + u * W);
    }
    for (int u = 0; u < kUnroll; ++u) store_to<kStreaming>(out + i + u * W, sum[u]);
  }
  for (; i < end; i += W) {
    const int64_t count = end - i < W ? end - i : W;
    vec<T> sum = {};
    for (int64_t p = 0; p < maps; ++p) sum += splat<T>(w[p]) * load_part(static_cast<const S*>(xs[p]) + i, count);
    store_part(out + i, sum, count);
  }
  if (kStreaming) streaming_fence();
}

// dx_p = w_p g, and dweights[p] = <g, x_p> over [begin, end), for maps first..first+count.
template <class S, bool kStreaming>
void backward_group(const MixArgs& a, int64_t first, int64_t count, int64_t begin, int64_t end, double* dweights) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>, kUnroll = 4, kGroup = 16;
  const T* w = static_cast<const T*>(a.weights) + first;
  const S* grad = static_cast<const S*>(a.grad);
  const void* const* xs = a.xs + first;
  void* const* dxs = a.dxs ? a.dxs + first : nullptr;
  vec<T> dot[kGroup] = {};
  int64_t i = begin;
  for (; i + kUnroll * W <= end; i += kUnroll * W) {
    vec<T> g[kUnroll];
    for (int u = 0; u < kUnroll; ++u) g[u] = load(grad + i + u * W);
    for (int64_t p = 0; dweights && p < count; ++p) {
      const S* x = static_cast<const S*>(xs[p]) + i;
      dot[p] += (g[0] * load(x) + g[1] * load(x + W)) + (g[2] * load(x + 2 * W) + g[3] * load(x + 3 * W));
    }
    for (int64_t p = 0; dxs && p < count; ++p) {
      S* dx = static_cast<S*>(dxs[p]) + i;
      const vec<T> wp = splat<T>(w[p]);
      for (int u = 0; u < kUnroll; ++u) store_to<kStreaming>(dx + u * W, wp * g[u]);
    }
  }
  for (; i < end; i += W) {
    const int64_t part = end - i < W ? end - i : W;
    const vec<T> g = load_part(grad + i, part);
    for (int64_t p = 0; p < count; ++p) {
      if (dweights) dot[p] += g * load_part(static_cast<const S*>(xs[p]) + i, part);
      if (dxs) store_part(static_cast<S*>(dxs[p]) + i, splat<T>(w[p]) * g, part);
    }
  }
  for (int64_t p = 0; dweights && p < count; ++p) dweights[first + p] = horizontal_sum<T>(dot[p]);
}

template <class S, bool kStreaming> void backward(const MixArgs& a, int64_t begin, int64_t end, double* dweights) {
  for (int64_t first = 0; first < a.maps; first += 16)
    backward_group<S, kStreaming>(a, first, a.maps - first < 16 ? a.maps - first : 16, begin, end, dweights);
  if (kStreaming) streaming_fence();
}

template <class S> void forward_as(const MixArgs& a, int64_t begin, int64_t end) {
  a.streaming ? forward<S, true>(a, begin, end) : forward<S, false>(a, begin, end);
}
template <class S> void backward_as(const MixArgs& a, int64_t begin, int64_t end, double* dweights) {
  a.streaming ? backward<S, true>(a, begin, end, dweights) : backward<S, false>(a, begin, end, dweights);
}

}  // namespace

void mix_forward(const MixArgs& a, int64_t begin, int64_t end) {
  switch (a.storage) {
    case 0:
      return forward_as<float>(a, begin, end);
    case 1:
      return forward_as<double>(a, begin, end);
    case 2:
      return forward_as<BFloat16>(a, begin, end);
    case 3:
      return forward_as<Half>(a, begin, end);
  }
}

void mix_backward(const MixArgs& a, int64_t begin, int64_t end, double* dweights) {
  switch (a.storage) {
    case 0:
      return backward_as<float>(a, begin, end, dweights);
    case 1:
      return backward_as<double>(a, begin, end, dweights);
    case 2:
      return backward_as<BFloat16>(a, begin, end, dweights);
    case 3:
      return backward_as<Half>(a, begin, end, dweights);
  }
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include "nasdet/checks.h"

namespace nasdet {
namespace {

constexpr int64_t kChunk = 16384;  // elements of one task: fixed, so that sums do not depend on threads

struct Maps {
  std::vector<Tensor> tensors;
  std::vector<const void*> pointers;
};

Maps maps_in_layout_of(const std::vector<Tensor>& xs, const Tensor& like) {
  Maps maps;
  for (const Tensor& x : xs) maps.tensors.push_back(in_layout_of(x, like));
  for (const Tensor& x : maps.tensors) maps.pointers.push_back(x.const_data_ptr());
  return maps;
}

void check(const std::vector<Tensor>& xs, const Tensor& weights) {
  STD_TORCH_CHECK(!xs.empty(), "xs must hold at least one map, got none");
  for (const Tensor& x : xs) {
    STD_TORCH_CHECK(same(x.sizes(), xs[0].sizes()), "xs must have one shape");
    STD_TORCH_CHECK(x.scalar_type() == xs[0].scalar_type() && x.is_cpu(), "xs must have one dtype and be on the CPU");
  }
  const bool wide = xs[0].scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(weights.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "weights must be float32 (float64 for float64 maps)");
  STD_TORCH_CHECK(weights.is_cpu() && weights.dim() == 1 && weights.size(0) == int64_t(xs.size()),
                  "weights must have shape (", xs.size(), ",) on the CPU");
}

// The maps whose weight is not zero, and those weights.
struct Terms {
  std::vector<const void*> pointers;
  std::vector<char> weights;

  Terms(const Maps& maps, const Tensor& w) {
    const char* all = static_cast<const char*>(w.const_data_ptr());
    const size_t size = w.element_size();
    for (size_t p = 0; p < maps.pointers.size(); ++p) {
      const char* weight = all + p * size;
      if (size == 8 ? *reinterpret_cast<const double*>(weight) == 0 : *reinterpret_cast<const float*>(weight) == 0)
        continue;
      pointers.push_back(maps.pointers[p]);
      weights.insert(weights.end(), weight, weight + size);
    }
  }
};

Tensor mix(std::vector<Tensor> xs, Tensor weights) {
  check(xs, weights);
  const Tensor w = torch::stable::contiguous(weights);
  Tensor out = torch::stable::empty_like(xs[0]);
  const Maps maps = maps_in_layout_of(xs, out);
  const int64_t count = out.numel();
  const Terms terms(maps, w);
  MixArgs args{terms.pointers.data(),
               terms.weights.data(),
               nullptr,
               nullptr,
               out.mutable_data_ptr(),
               int64_t(terms.pointers.size()),
               storage_code(out, "xs"),
               count * int64_t(out.element_size()) >= kStreamingBytes && aligned(out)};
  const auto kernel = NASDET_KERNEL(mix_forward);
  torch::stable::parallel_for(0, (count + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    kernel(args, first * kChunk, last * kChunk < count ? last * kChunk : count);
  });
  return out;
}

std::tuple<std::vector<Tensor>, Tensor> mix_backward_op(Tensor grad, std::vector<Tensor> xs, Tensor weights,
                                                        bool need_xs, bool need_weights) {
  check(xs, weights);
  STD_TORCH_CHECK(same(grad.sizes(), xs[0].sizes()) && grad.scalar_type() == xs[0].scalar_type(),
                  "grad must have the maps' shape and dtype");
  const Tensor w = torch::stable::contiguous(weights);
  const Tensor like = torch::stable::empty_like(xs[0]);
  const Maps maps = maps_in_layout_of(xs, like);
  const Tensor g = in_layout_of(grad, like);
  const int64_t count = like.numel(), chunks = (count + kChunk - 1) / kChunk, P = xs.size();
  std::vector<Tensor> dxs;
  std::vector<void*> dx_pointers;
  bool streaming = P * count * int64_t(like.element_size()) >= kStreamingBytes;
  for (int64_t p = 0; need_xs && p < P; ++p) {
    dxs.push_back(p == 0 ? like : torch::stable::empty_like(like));
    dx_pointers.push_back(dxs.back().mutable_data_ptr());
    streaming &= aligned(dxs.back());
  }
  MixArgs args{maps.pointers.data(),
               w.const_data_ptr(),
               g.const_data_ptr(),
               need_xs ? dx_pointers.data() : nullptr,
               nullptr,
               P,
               storage_code(like, "xs"),
               streaming};
  std::vector<double> partial(need_weights ? chunks * P : 0);
  const auto kernel = NASDET_KERNEL(mix_backward);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      kernel(args, c * kChunk, c * kChunk + kChunk < count ? c * kChunk + kChunk : count,
             need_weights ? &partial[c * P] : nullptr);
  });
  Tensor dweights = torch::stable::new_zeros(w, {need_weights ? P : 0});
  for (int64_t p = 0; need_weights && p < P; ++p) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[c * P + p];
    if (w.scalar_type() == ScalarType::Double) static_cast<double*>(dweights.mutable_data_ptr())[p] = sum;
    else static_cast<float*>(dweights.mutable_data_ptr())[p] = float(sum);
  }
  return {dxs, dweights};
}

}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("mix", TORCH_BOX(&nasdet::mix));
  m.impl("mix_backward", TORCH_BOX(&nasdet::mix_backward_op));
}
#endif
