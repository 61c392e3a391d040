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
#define NASDET_DECLARE_KERNEL(result, name, ...)   \
  namespace nasdet {                               \
  namespace baseline { result name(__VA_ARGS__); } \
  namespace avx2 { result name(__VA_ARGS__); }     \
  namespace avx512 { using avx2::name; }           \
  namespace avx512_bf16 { using avx2::name; }      \
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

// Declares a kernel on matrix tiles (amx.h): with those of the CPU, or with emulated ones.
#if defined(NASDET_X86) && !defined(NASDET_UP_TO_AVX2)
#define NASDET_DECLARE_TILE_KERNEL(result, name, ...) \
  namespace nasdet {                                  \
  namespace baseline { result name(__VA_ARGS__); }    \
  namespace avx512_bf16 { result name(__VA_ARGS__); } \
  }
#define NASDET_TILE_KERNEL(name) \
  (::nasdet::tiles() == ::nasdet::Tiles::hardware ? ::nasdet::avx512_bf16::name : ::nasdet::baseline::name)
#else
#define NASDET_DECLARE_TILE_KERNEL(result, name, ...) \
  namespace nasdet {                                  \
  namespace baseline { result name(__VA_ARGS__); }    \
  }
#define NASDET_TILE_KERNEL(name) (::nasdet::baseline::name)
#endif

#ifdef NASDET_REGISTER
#include <cstdlib>
#include <cstring>
#if defined(NASDET_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nasdet {

// amx: the kernels of avx512_bf16, and where there are some those on matrix tiles.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };
enum class Tiles : int { none, emulated, hardware };

#if defined(NASDET_X86) && defined(__linux__)
// Whether CPU and system have tiles of bfloat16.
inline bool has_amx() {
  constexpr unsigned kOsSavesState = 1u << 27, kTile = 1u << 24, kBfloat16 = 1u << 22, kTileState = 3u << 17;
  unsigned a, b, c, d, state;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsSavesState)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBfloat16)) != (kTile | kBfloat16)) return false;
  __asm__ volatile("xgetbv" : "=a"(state), "=d"(d) : "c"(0));
  return (state & kTileState) == kTileState;
}
// Whether the system lets this process use them: it does not before it is asked, and from then on wants larger signal stacks.
inline bool amx_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
inline bool has_amx() { return false; }
inline bool amx_granted() { return false; }
#endif

// The best instruction set of this CPU, capped by NASDET_CPU_CAPABILITY=baseline|avx2|avx512|avx512_bf16|amx, or
// amx_emulated, for tests: what the CPU has below amx, and kernels on tiles in plain C++.
inline Isa cpu_capability() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#ifdef NASDET_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      best = Isa::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512cd"))
        best = __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    }
#endif
#ifdef NASDET_UP_TO_AVX2
    Isa cap = Isa::avx2;
#else
    Isa cap = Isa::amx;
#endif
    if (const char* name = std::getenv("NASDET_CPU_CAPABILITY")) {
      if (!std::strcmp(name, "baseline")) cap = Isa::baseline;
      if (!std::strcmp(name, "avx2")) cap = Isa::avx2;
      if (!std::strcmp(name, "avx512") && cap > Isa::avx512) cap = Isa::avx512;
      if ((!std::strcmp(name, "avx512_bf16") || !std::strcmp(name, "amx_emulated")) && cap > Isa::avx512_bf16)
        cap = Isa::avx512_bf16;
    }
    if (best == Isa::avx512_bf16 && cap == Isa::amx && has_amx()) best = Isa::amx;
    return best < cap ? best : cap;
  }();
  return chosen;
}

// The first call asks the system for its tiles, which it may refuse.
inline Tiles tiles() {
  static const Tiles chosen = [] {
    const char* const name = std::getenv("NASDET_CPU_CAPABILITY");
    if (name && !std::strcmp(name, "amx_emulated")) return Tiles::emulated;
    return cpu_capability() == Isa::amx && amx_granted() ? Tiles::hardware : Tiles::none;
  }();
  return chosen;
}

}  // namespace nasdet

#ifdef NASDET_X86
#define NASDET_KERNEL(name)                                                               \
  (::nasdet::cpu_capability() >= ::nasdet::Isa::avx512_bf16 ? ::nasdet::avx512_bf16::name \
   : ::nasdet::cpu_capability() == ::nasdet::Isa::avx512    ? ::nasdet::avx512::name      \
   : ::nasdet::cpu_capability() == ::nasdet::Isa::avx2      ? ::nasdet::avx2::name        \
                                                            : ::nasdet::baseline::name)
#else
#define NASDET_KERNEL(name) (::nasdet::baseline::name)
#endif

// Of kernels that take several dtypes (`storage`: storage_code) and have no others than bfloat16 where CPUs have its
// instructions: the rest gains nothing from them, and takes as long to compile.
#ifdef NASDET_X86
#define NASDET_STORAGE_KERNEL(storage, name)                                                          \
  (::nasdet::cpu_capability() >= ::nasdet::Isa::avx512_bf16 && (storage) != ::nasdet::kStoredBFloat16 \
       ? ::nasdet::avx512::name                                                                       \
       : NASDET_KERNEL(name))
#else
#define NASDET_STORAGE_KERNEL(storage, name) NASDET_KERNEL(name)
#endif
#endif  // NASDET_REGISTER
