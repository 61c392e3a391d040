// Prints the largest error in ulp of each function of simd_math.h over its range: `name float|double ulp`.
#define NASDET_ISA checked
#include "nasdet/simd_math.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

using namespace nasdet::checked;

namespace {

template <class T> long double ulp_of(long double value) {
  int exponent;
  std::frexp(std::fabs(value), &exponent);
  return std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits);
}

// Visits `count` numbers of one sign between two magnitudes, evenly in their bit patterns.
template <class T, class Function, class Exact>
long double worst(T first, T last, int64_t count, Function function, Exact exact, bool absolute = false) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits low, high;
  std::memcpy(&low, &first, sizeof low);
  std::memcpy(&high, &last, sizeof high);
  const double step = double(high - low) / double(count);
  long double error = 0;
  for (int64_t i = 0; i <= count; i += kLanes<T>) {
    vec<T> v;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const Bits offset = Bits(double(i + lane) * step), bits = low + (offset > high - low ? high - low : offset);
      T value;
      std::memcpy(&value, &bits, sizeof value);
      v[lane] = value;
    }
    const vec<T> got = function(v);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const long double wanted = exact((long double)v[lane]),
                        unit = absolute ? std::max(std::fabs(wanted), 1.0L) : wanted;
      const long double distance = std::fabs((long double)got[lane] - wanted) / ulp_of<T>(unit);
      if (!(distance <= error)) error = distance;
    }
  }
  return error;
}

template <class T> bool check(const char* type, int64_t count) {
  const T lowest = MathTraits<T>::kLowestExponent, tiny = std::numeric_limits<T>::min();
  const auto report = [&](const char* name, long double error) { std::printf("%s %s %.3Lf\n", name, type, error); };
  const auto exp_of = [](long double v) { return std::exp(v); };
  const auto log1p_of = [](long double v) { return std::log1p(v); };
  const auto log_of = [](long double v) { return std::log(v); };
  report("exp_nonpositive", worst<T>(-tiny, lowest, count, exp_nonpositive<T>, exp_of));
  report("log1p_unit", worst<T>(tiny, T(1), count, log1p_unit<T>, log1p_of));
  report("log_normal", worst<T>(tiny, T(2), count, log_normal<T>, log_of, true));
  const T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  bool edges = exp_nonpositive<T>(splat<T>(0))[0] == 1 && log1p_unit<T>(splat<T>(0))[0] == 0 &&
               log_normal<T>(splat<T>(1))[0] == 0;
  edges &= std::isnan(exp_nonpositive<T>(splat<T>(nan))[0]) && std::isnan(log1p_unit<T>(splat<T>(nan))[0]);
  const T floor = exp_nonpositive<T>(splat<T>(-infinity))[0];
  edges &= floor >= tiny && floor == exp_nonpositive<T>(splat<T>(2 * lowest))[0];
  if (!edges) std::printf("edges %s wrong\n", type);
  return edges;
}

}  // namespace

int main() { return check<float>("float", 4000000) & check<double>("double", 1000000) ? 0 : 1; }
