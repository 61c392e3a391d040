// One kernel source, several instruction sets. CMake compiles every csrc/cpu/*.cpp once per instruction set with
// NASDET_ISA naming it; the baseline pass also defines NASDET_REGISTER and holds the launchers. Kernel code must
// include nothing but <cstdint> and these headers: an inline std:: function compiled for AVX-512 could otherwise
// be the copy that the linker keeps for every CPU.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define NASDET_X86 1
#endif

// Declares a kernel in the namespace of each instruction set. NASDET_UP_TO_AVX2: a build without the wider ones.
#ifdef NASDET_UP_TO_AVX2
#define NASDET_DECLARE_KERNEL(result, name, ...)      \
  namespace nasdet {                                  \
  namespace baseline { result name(__VA_ARGS__); }    \
  namespace avx2 { result name(__VA_ARGS__); }        \
  namespace avx512 { using avx2::name; }              \
  namespace avx512_bf16 { using avx2::name; }         \
  }
#else
#define NASDET_DECLARE_KERNEL(result, name, ...)      \
  namespace nasdet {                                  \
  namespace baseline { result name(__VA_ARGS__); }    \
  namespace avx2 { result name(__VA_ARGS__); }        \
  namespace avx512 { result name(__VA_ARGS__); }      \
  namespace avx512_bf16 { result name(__VA_ARGS__); } \
  }
#endif

#ifdef NASDET_REGISTER
#include <cstdlib>
#include <cstring>

namespace nasdet {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best instruction set of this CPU, capped by NASDET_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16.
inline Isa cpu_capability() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#ifdef NASDET_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      best = Isa::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
        best = __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    }
#endif
#ifdef NASDET_UP_TO_AVX2
    Isa cap = Isa::avx2;
#else
    Isa cap = Isa::avx512_bf16;
#endif
    if (const char* name = std::getenv("NASDET_CPU_CAPABILITY")) {
      if (!std::strcmp(name, "baseline")) cap = Isa::baseline;
      if (!std::strcmp(name, "avx2")) cap = Isa::avx2;
      if (!std::strcmp(name, "avx512") && cap > Isa::avx512) cap = Isa::avx512;
    }
    return best < cap ? best : cap;
  }();
  return chosen;
}

}  // namespace nasdet

#ifdef NASDET_X86
#define NASDET_KERNEL(name)                                                                \
  (::nasdet::cpu_capability() == ::nasdet::Isa::avx512_bf16 ? ::nasdet::avx512_bf16::name \
   : ::nasdet::cpu_capability() == ::nasdet::Isa::avx512    ? ::nasdet::avx512::name      \
   : ::nasdet::cpu_capability() == ::nasdet::Isa::avx2      ? ::nasdet::avx2::name        \
                                                            : ::nasdet::baseline::name)
#else
#define NASDET_KERNEL(name) (::nasdet::baseline::name)
#endif
#endif  // NASDET_REGISTER
