// Sigmoid focal loss and its gradients in one pass over logits and targets.
#include "nasdet/isa.h"
#include "nasdet/simd.h"
#include "nasdet/simd_math.h"

namespace nasdet {

struct FocalArgs {
  const void* logits;   // [count] dense; all arrays are laid out as the logits
  const void* targets;  // [count]
  const void* grad;     // backward: [count], or null where the loss was summed
  void* out;            // forward: [count], or null where only the sum is wanted
  void* dlogits;        // backward: [count], or null when not wanted
  void* dtargets;
  double alpha[2];  // weight of targets 0 and 1
  double gamma;
  double scale;    // backward: the gradient of the sum
  int storage;     // storage_code()
  bool streaming;  // results are larger than the caches and aligned: bypass them
};

}  // namespace nasdet

NASDET_DECLARE_KERNEL(void, focal_forward, const FocalArgs&, int64_t begin, int64_t end, double* sum)
NASDET_DECLARE_KERNEL(void, focal_backward, const FocalArgs&, int64_t begin, int64_t end)

namespace nasdet::NASDET_ISA {
namespace {

// Everything is written in z = |x| and in the target u of the class that x speaks for (t where x >= 0, else 1 - t). Then
// 1 - p_t = (1 - u + u e) / (1 + e) and the cross-entropy (1 - u) z + log(1 + e), e = exp(-z), are sums of terms of one
// sign: nothing cancels at any logit, and as e never reaches 0 no quotient is 0/0.
template <class T> struct Terms {
  vec<T> x, e, log1p_e, inverse, target, rest, unsure, entropy, alpha;
  decltype(vec<T>{} < vec<T>{}) negative;

  NASDET_INLINE Terms(vec<T> logits, vec<T> t, T alpha0, T alpha_slope) : x(logits), negative(logits < T(0)) {
    const vec<T> z = negative ? -x : x;
    target = negative ? T(1) - t : t;
    rest = T(1) - target;
    e = exp_nonpositive<T>(-z);
    log1p_e = log1p_unit<T>(e);
    inverse = T(1) / (T(1) + e);
    unsure = rest + target * e;  // (1 - p_t) (1 + e)
    entropy = rest * z + log1p_e;
    alpha = alpha0 + t * alpha_slope;
  }

  template <bool kSquare> NASDET_INLINE vec<T> modulation(T gamma) const {  // (1 - p_t)^gamma
    if constexpr (kSquare) {
      const vec<T> q = unsure * inverse;
      return q * q;
    }
    const vec<T> z = negative ? -x : x;  // log(e), also where e has stopped following it
    // Targets of 0 and 1 alone, as they mostly are, need no logarithm: `unsure` is 1 or e.
    constexpr int kCount = kLanes<T>;
    const bool sure = equal_bits<T>(rest * target, vec<T>{}) == (1u << kCount) - 1;
    const vec<T> of_rest = sure ? vec<T>{} : log_normal<T>(unsure);
    return exp_nonpositive<T>(gamma * ((rest == T(0) ? -z : of_rest) - log1p_e));
  }

  template <bool kSquare> NASDET_INLINE vec<T> logit_gradient(T gamma) const {
    const vec<T> slope = (rest - target * e) * inverse;  // of the cross-entropy
    const vec<T> step = e * inverse * (rest - target);   // d(1 - p_t)/dz (1 + e)
    vec<T> by_z;
    if constexpr (kSquare) {
      const vec<T> q = unsure * inverse;
      by_z = alpha * q * (T(2) * step * inverse * entropy + q * slope);
    } else {
      by_z = alpha * modulation<false>(gamma) * (gamma * step / unsure * entropy + slope);
    }
    return negative ? -by_z : by_z;
  }

  NASDET_INLINE vec<T> target_gradient(T gamma, T alpha_slope) const {
    const vec<T> ratio = (T(1) - e) / unsure;                             // |d(1 - p_t)/dt| / (1 - p_t)
    const vec<T> by_q = gamma * ((negative ? ratio : -ratio) * entropy);  // gamma * ratio may be infinite
    return modulation<false>(gamma) * (alpha_slope * entropy + alpha * (by_q - x));
  }
};

template <class S, bool kSquare, bool kStreaming> void map_loss(const FocalArgs& a, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const S *logits = static_cast<const S*>(a.logits), *targets = static_cast<const S*>(a.targets);
  S* out = static_cast<S*>(a.out);
  const T gamma = T(a.gamma), alpha0 = T(a.alpha[0]), slope = T(a.alpha[1] - a.alpha[0]);
  const auto loss = [=](vec<T> x, vec<T> t) __attribute__((always_inline)) {
    const Terms<T> terms(x, t, alpha0, slope);
    return terms.alpha * terms.template modulation<kSquare>(gamma) * terms.entropy;
  };
  int64_t i = begin;
  for (; i + W <= end; i += W) store_to<kStreaming>(out + i, loss(load(logits + i), load(targets + i)));
  if (i < end) store_part(out + i, loss(load_part(logits + i, end - i), load_part(targets + i, end - i)), end - i);
  if (kStreaming) streaming_fence();
}

template <class S, bool kSquare> double sum_loss(const FocalArgs& a, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>, kRun = 32;  // vectors that are added before the sum goes on in double
  const S *logits = static_cast<const S*>(a.logits), *targets = static_cast<const S*>(a.targets);
  const T gamma = T(a.gamma), alpha0 = T(a.alpha[0]), slope = T(a.alpha[1] - a.alpha[0]);
  const auto loss = [=](vec<T> x, vec<T> t) __attribute__((always_inline)) {
    const Terms<T> terms(x, t, alpha0, slope);
    return terms.alpha * terms.template modulation<kSquare>(gamma) * terms.entropy;
  };
  double total = 0;
  int64_t i = begin;
  while (i + W <= end) {
    vec<T> sum = {};
    const int64_t stop = end - i < kRun * W ? end : i + kRun * W;
    for (; i + W <= stop; i += W) sum += loss(load(logits + i), load(targets + i));
    total += double(horizontal_sum<T>(sum));
  }
  if (i < end) {
    T tail[W];
    const vec<T> v = loss(load_part(logits + i, end - i), load_part(targets + i, end - i));
    __builtin_memcpy(tail, &v, sizeof v);
    for (int64_t j = 0; j < end - i; ++j) total += double(tail[j]);
  }
  return total;
}

template <class S, bool kSquare, bool kStreaming> void gradient(const FocalArgs& a, int64_t begin, int64_t end) {
  using T = arithmetic_t<S>;
  constexpr int W = kWidth<S>;
  const S *logits = static_cast<const S*>(a.logits), *targets = static_cast<const S*>(a.targets),
          *grad = static_cast<const S*>(a.grad);
  S *dlogits = static_cast<S*>(a.dlogits), *dtargets = static_cast<S*>(a.dtargets);
  const T gamma = T(a.gamma), alpha0 = T(a.alpha[0]), slope = T(a.alpha[1] - a.alpha[0]), scale = T(a.scale);
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    const Terms<T> terms(load(logits + i), load(targets + i), alpha0, slope);
    const vec<T> g = grad ? load(grad + i) : splat<T>(scale);
    if (dlogits) store_to<kStreaming>(dlogits + i, g * terms.template logit_gradient<kSquare>(gamma));
    if (dtargets) store_to<kStreaming>(dtargets + i, g * terms.target_gradient(gamma, slope));
  }
  if (i < end) {
    const int64_t part = end - i;
    const Terms<T> terms(load_part(logits + i, part), load_part(targets + i, part), alpha0, slope);
    const vec<T> g = grad ? load_part(grad + i, part) : splat<T>(scale);
    if (dlogits) store_part(dlogits + i, g * terms.template logit_gradient<kSquare>(gamma), part);
    if (dtargets) store_part(dtargets + i, g * terms.target_gradient(gamma, slope), part);
  }
  if (kStreaming) streaming_fence();
}

template <class S, bool kSquare> void forward_as(const FocalArgs& a, int64_t begin, int64_t end, double* sum) {
  if (sum) *sum = sum_loss<S, kSquare>(a, begin, end);
  else if (a.streaming) map_loss<S, kSquare, true>(a, begin, end);
  else map_loss<S, kSquare, false>(a, begin, end);
}
template <class S> void forward_of(const FocalArgs& a, int64_t begin, int64_t end, double* sum) {
  a.gamma == 2 ? forward_as<S, true>(a, begin, end, sum) : forward_as<S, false>(a, begin, end, sum);
}
template <class S, bool kSquare> void backward_as(const FocalArgs& a, int64_t begin, int64_t end) {
  a.streaming ? gradient<S, kSquare, true>(a, begin, end) : gradient<S, kSquare, false>(a, begin, end);
}
template <class S> void backward_of(const FocalArgs& a, int64_t begin, int64_t end) {
  a.gamma == 2 ? backward_as<S, true>(a, begin, end) : backward_as<S, false>(a, begin, end);
}

}  // namespace

void focal_forward(const FocalArgs& a, int64_t begin, int64_t end, double* sum) {
  switch (a.storage) {
    case 0:
      return forward_of<float>(a, begin, end, sum);
    case 1:
      return forward_of<double>(a, begin, end, sum);
    case 2:
      return forward_of<BFloat16>(a, begin, end, sum);
    case 3:
      return forward_of<Half>(a, begin, end, sum);
  }
}

void focal_backward(const FocalArgs& a, int64_t begin, int64_t end) {
  switch (a.storage) {
    case 0:
      return backward_of<float>(a, begin, end);
    case 1:
      return backward_of<double>(a, begin, end);
    case 2:
      return backward_of<BFloat16>(a, begin, end);
    case 3:
      return backward_of<Half>(a, begin, end);
  }
}

}  // namespace nasdet::NASDET_ISA

#ifdef NASDET_REGISTER
#include "nasdet/checks.h"

namespace nasdet {
namespace {

constexpr int64_t kChunk = 16384;  // elements of one task: fixed, so that sums do not depend on threads

void check(const Tensor& logits, const Tensor& targets, double alpha, double gamma) {
  STD_TORCH_CHECK(logits.is_cpu() && targets.is_cpu(), "logits and targets must be on the CPU");
  STD_TORCH_CHECK(same(targets.sizes(), logits.sizes()), "targets must have the logits' shape");
  STD_TORCH_CHECK(targets.scalar_type() == logits.scalar_type(), "targets must have the logits' dtype");
  STD_TORCH_CHECK((alpha >= 0 && alpha <= 1) || alpha == -1, "alpha must be in [0, 1] or -1, got ", alpha);
  STD_TORCH_CHECK(gamma >= 0, "gamma must be at least 0, got ", gamma);
}

FocalArgs arguments(const Tensor& logits, const Tensor& targets, double alpha, double gamma) {
  FocalArgs args{};
  args.logits = logits.const_data_ptr();
  args.targets = targets.const_data_ptr();
  args.alpha[0] = alpha < 0 ? 1 : 1 - alpha;
  args.alpha[1] = alpha < 0 ? 1 : alpha;
  args.gamma = gamma;
  args.storage = storage_code(logits, "logits");
  return args;
}

bool bypass_caches(const Tensor& result) {
  return result.numel() * int64_t(result.element_size()) >= kStreamingBytes && aligned(result);
}

// Whether the elements fill one block of memory, in any order of the dimensions.
bool dense(const Tensor& t) {
  int64_t expected = 1;
  for (bool found = true; found && expected != t.numel();) {
    found = false;
    for (int64_t d = 0; d < t.dim() && !found; ++d)
      if (t.size(d) > 1 && t.stride(d) == expected) expected *= t.size(d), found = true;
  }
  return expected == t.numel();
}

Tensor scalar_like(const Tensor& logits, double value) {
  const bool wide = logits.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_zeros(logits, torch::headeronly::IntHeaderOnlyArrayRef(),
                                        wide ? ScalarType::Double : ScalarType::Float);
  if (wide) *static_cast<double*>(out.mutable_data_ptr()) = value;
  else *static_cast<float*>(out.mutable_data_ptr()) = float(value);
  return out;
}

Tensor sigmoid_focal_loss(Tensor logits, Tensor targets, double alpha, double gamma, bool reduce_sum) {
  check(logits, targets, alpha, gamma);
  const Tensor like = reduce_sum && dense(logits) ? logits : torch::stable::empty_like(logits);
  const Tensor x = in_layout_of(logits, like), t = in_layout_of(targets, like);
  FocalArgs args = arguments(x, t, alpha, gamma);
  const int64_t count = logits.numel(), chunks = (count + kChunk - 1) / kChunk;
  std::vector<double> partial(reduce_sum ? chunks : 0);
  if (!reduce_sum) {
    args.out = like.mutable_data_ptr();
    args.streaming = bypass_caches(like);
  }
  const auto kernel = NASDET_KERNEL(focal_forward);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      kernel(args, c * kChunk, c * kChunk + kChunk < count ? c * kChunk + kChunk : count,
             reduce_sum ? &partial[c] : nullptr);
  });
  if (!reduce_sum) return like;
  double total = 0;
  for (const double sum : partial) total += sum;
  return scalar_like(logits, total);
}

std::tuple<Tensor, Tensor> sigmoid_focal_loss_backward(Tensor grad, Tensor logits, Tensor targets, double alpha,
                                                       double gamma, bool reduce_sum, bool need_logits,
                                                       bool need_targets) {
  check(logits, targets, alpha, gamma);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(grad.is_cpu(), "grad must be on the CPU");
  if (reduce_sum) {
    STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                    "grad must be one float32 (float64 for float64 logits)");
  } else {
    STD_TORCH_CHECK(same(grad.sizes(), logits.sizes()) && grad.scalar_type() == logits.scalar_type(),
                    "grad must have the logits' shape and dtype");
  }
  const Tensor nothing = torch::stable::new_zeros(logits, {0});
  if (!need_logits && !need_targets) return {nothing, nothing};
  Tensor first = torch::stable::empty_like(logits);
  Tensor second = need_logits && need_targets ? torch::stable::empty_like(first) : first;
  const Tensor x = in_layout_of(logits, first);
  const Tensor t = in_layout_of(targets, first);
  const Tensor g = reduce_sum ? grad : in_layout_of(grad, first);
  FocalArgs args = arguments(x, t, alpha, gamma);
  if (reduce_sum)
    args.scale =
        wide ? *static_cast<const double*>(g.const_data_ptr()) : *static_cast<const float*>(g.const_data_ptr());
  else args.grad = g.const_data_ptr();
  args.dlogits = need_logits ? first.mutable_data_ptr() : nullptr;
  args.dtargets = need_targets ? second.mutable_data_ptr() : nullptr;
  args.streaming = bypass_caches(first) && aligned(second);
  const int64_t count = logits.numel();
  const auto kernel = NASDET_KERNEL(focal_backward);
  torch::stable::parallel_for(0, (count + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin * kChunk, end * kChunk < count ? end * kChunk : count);
  });
  return {need_logits ? first : nothing, need_targets ? second : nothing};
}

}  // namespace
}  // namespace nasdet

STABLE_TORCH_LIBRARY_IMPL(nasdet, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&nasdet::sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&nasdet::sigmoid_focal_loss_backward));
}
#endif
