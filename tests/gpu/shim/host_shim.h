// Runs CUDA kernel bodies on the CPU, one fiber per CUDA thread: index arithmetic, barriers, warp steps and shared memory under
// the address and undefined-behaviour sanitizers. Include it before a kernel file, then start kernels with shim::launch.
//
// Blocks run one after another. Within a block every thread runs until it waits at a barrier or a warp step; `shim::reverse`
// starts with the last thread, so that a missing barrier changes the result. Shared memory is filled with NaN before each block.
// A block whose threads wait at different barriers, or a warp step that a lane of its mask never reaches, throws.
#pragma once
#include <link.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
// Fibers share their thread's local storage, and its extent is known: shared memory can be poisoned without a list of arrays.
#define __shared__ static thread_local
#define NASDET_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(shim::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace shim {

enum class State { ready, at_barrier, at_warp_step, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state = State::ready;
  int line = 0;          // of the barrier or warp step that it waits at
  unsigned mask = 0;     // of the warp step
  uint64_t deposit = 0;  // what it brings to the warp step
  uint64_t shown = 0;    // the same once the step is complete: the others may be at the next one before this is read
};

constexpr size_t kStackBytes = 256 << 10;
inline std::vector<Fiber> fibers;
inline size_t alive = 0, current = 0, threads = 0;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline const std::function<void()>* body = nullptr;
inline std::exception_ptr failure;
inline bool reverse = false;
inline std::unique_ptr<char[]> dynamic_memory;
inline void* dynamic_shared() { return dynamic_memory.get(); }

inline void set_thread(size_t i) {
  threadIdx =
      dim3(unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y), unsigned(i / blockDim.x / blockDim.y));
}

// Back to the scheduler until it resumes this fiber.
inline void wait(State state, int line, unsigned mask = 0) {
  Fiber& f = fibers[current];
  f.state = state, f.line = line, f.mask = mask;
  __sanitizer_start_switch_fiber(&f.fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&f.context, &scheduler);
  __sanitizer_finish_switch_fiber(fibers[current].fake_stack, nullptr, nullptr);
}

inline void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  try {
    (*body)();
  } catch (...) { failure = std::current_exception(); }
  Fiber& f = fibers[current];
  f.state = State::done;
  --alive;
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);  // null: this fiber is over
  swapcontext(&f.context, &scheduler);
}

inline void resume(size_t i) {
  current = i;
  set_thread(i);
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fibers[i].stack.get(), kStackBytes);
  swapcontext(&scheduler, &fibers[i].context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
  if (failure) std::rethrow_exception(failure);
}

inline void refuse(const std::string& what, int line, int other) {
  throw std::runtime_error(what + ": lines " + std::to_string(line) + " and " + std::to_string(other));
}

// Frees the block's barrier once every live thread has reached it.
inline bool release_barrier() {
  int line = -1;
  for (size_t i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == State::done) continue;
    if (f.state != State::at_barrier) return false;
    if (line >= 0 && line != f.line) refuse("threads of a block wait at different __syncthreads", line, f.line);
    line = f.line;
  }
  for (size_t i = 0; i < threads; ++i)
    if (fibers[i].state == State::at_barrier) fibers[i].state = State::ready;
  return line >= 0;
}

// Frees each warp step once every lane of its mask has reached it.
inline bool release_warp(size_t first) {
  bool any = false;
  for (size_t lane = 0; lane < 32 && first + lane < threads; ++lane) {
    Fiber& f = fibers[first + lane];
    if (f.state != State::at_warp_step) continue;
    bool complete = true;
    for (size_t other = 0; other < 32; ++other) {
      if (!(f.mask >> other & 1)) continue;
      if (first + other >= threads || fibers[first + other].state == State::done)
        throw std::runtime_error("a lane in the mask of a warp step is not there: line " + std::to_string(f.line));
      const Fiber& o = fibers[first + other];
      if (o.state != State::at_warp_step) complete = false;
      else if (o.line != f.line || o.mask != f.mask)
        refuse("lanes of a mask wait at different warp steps", f.line, o.line);
    }
    if (!complete) continue;
    const unsigned mask = f.mask;
    for (size_t other = 0; other < 32; ++other)
      if (mask >> other & 1)
        fibers[first + other].state = State::ready, fibers[first + other].shown = fibers[first + other].deposit;
    any = true;
  }
  return any;
}

// Every byte 0xFF: a NaN in every floating type, -1 as an integer.
inline int poison_shared(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data)
      std::memset(info->dlpi_tls_data, 0xFF, info->dlpi_phdr[i].p_memsz);
  return 1;  // the program itself comes first; the libraries' storage is their own
}

inline void run_block(const std::function<void()>& f, size_t shared_bytes) {
  body = &f, failure = nullptr;
  threads = alive = size_t(blockDim.x) * blockDim.y * blockDim.z;
  if (fibers.size() < threads) fibers.resize(threads);
  dl_iterate_phdr(poison_shared, nullptr);
  dynamic_memory.reset(new char[shared_bytes]);
  std::memset(dynamic_memory.get(), 0xFF, shared_bytes);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  while (alive) {
    bool moved = false;
    for (size_t k = 0; k < threads; ++k) {
      const size_t i = reverse ? threads - 1 - k : k;
      if (fibers[i].state == State::ready) resume(i), moved = true;
    }
    for (size_t first = 0; first < threads; first += 32) moved |= release_warp(first);
    moved |= release_barrier();
    if (!moved && alive) throw std::runtime_error("deadlock: some threads of a block wait where the others never come");
  }
}

template <class Kernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel, Args... args) {
  gridDim = grid, blockDim = block;
  const std::function<void()> f = [&] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blockIdx = dim3(x, y, z), run_block(f, shared_bytes);
}

// Every lane of the mask brings its value, waits for the others, and reads that of lane source(lane).
template <class T, class Source> T exchange(unsigned mask, T value, Source source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane shows at most 8 bytes");
  const size_t first = current / 32 * 32, lane = current % 32;
  if (!(mask >> lane & 1))
    throw std::runtime_error("a lane outside the mask takes part in a warp step: line " + std::to_string(line));
  std::memcpy(&fibers[current].deposit, &value, sizeof value);
  wait(State::at_warp_step, line, mask);
  const int from = source(int(lane));
  if (from < 0 || from > 31 || !(mask >> from & 1))
    throw std::runtime_error("a lane reads from a lane outside the mask: line " + std::to_string(line));
  T result;
  std::memcpy(&result, &fibers[first + size_t(from)].shown, sizeof result);
  return result;
}

inline unsigned ballot(unsigned mask, bool vote, int line) {
  const size_t first = current / 32 * 32;
  if (!(mask >> current % 32 & 1))
    throw std::runtime_error("a lane outside the mask takes part in a warp step: line " + std::to_string(line));
  fibers[current].deposit = vote;
  wait(State::at_warp_step, line, mask);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && fibers[first + lane].shown) votes |= 1u << lane;
  return votes;
}

}  // namespace shim

#define __syncthreads() shim::wait(shim::State::at_barrier, __LINE__)
#define __syncwarp(...) shim::ballot(unsigned(0xffffffffu __VA_OPT__(&) __VA_ARGS__), false, __LINE__)
#define __ballot_sync(mask, vote) shim::ballot(mask, vote, __LINE__)
#define __any_sync(mask, vote) (shim::ballot(mask, vote, __LINE__) != 0)
#define __shfl_sync(mask, value, from) shim::exchange(mask, value, [&](int) { return int(from) & 31; }, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  shim::exchange(mask, value, [&](int lane) { return lane ^ int(bits); }, __LINE__)
#define __shfl_down_sync(mask, value, by) \
  shim::exchange(mask, value, [&](int lane) { return lane + int(by) < 32 ? lane + int(by) : lane; }, __LINE__)
#define __shfl_up_sync(mask, value, by) \
  shim::exchange(mask, value, [&](int lane) { return lane >= int(by) ? lane - int(by) : lane; }, __LINE__)

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) {
  const T before = *p;
  *p += v;
  return before;
}

struct __half { _Float16 v; };
inline float __half2float(__half h) { return float(h.v); }
inline __half __float2half_rn(float f) { return {_Float16(f)}; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t wide = uint32_t(b.bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {  // to nearest, ties to even
  uint32_t wide;
  std::memcpy(&wide, &f, sizeof wide);
  if (f != f) return {0x7FFF};
  return {uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16)};
}
