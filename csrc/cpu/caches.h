// What the caches of this machine hold.
#pragma once
#include <algorithm>
#include <cstdint>
#ifdef __linux__
#include <unistd.h>
#endif

namespace nasdet {
namespace {

// Bytes of a core's second cache: 1 MiB where the system does not say, 2 MiB at most, for larger ones are shared by cores.
inline int64_t core_cache() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found <= 0 ? int64_t(1) << 20 : std::clamp<int64_t>(found, 256 << 10, 2 << 20);
  }();
  return bytes;
}

// Whether a result of whole cache lines is better written past the caches: with what it is made from it does not stay in a
// core's own, and its lines would be fetched to be overwritten.
inline bool written_past(const void* result, int64_t row_bytes, int64_t bytes_of_all) {
  constexpr int64_t kLine = 64;
  return bytes_of_all > core_cache() && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(result) % kLine == 0;
}

}  // namespace
}  // namespace nasdet
