// Kernels with one planted bug each: the shim must refuse or expose every one of them.
#include "host_shim.h"

#include <cstdio>

namespace {

constexpr int kThreads = 64;

__global__ void reverse_in_shared(const float* in, float* out, bool barrier) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void reverse_in_dynamic_shared(const float* in, float* out) {
  NASDET_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void read_unwritten(float* out) {
  __shared__ float tile[kThreads];
  if (threadIdx.x) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void missing_lane(float* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_down_sync(0xffffffffu, float(threadIdx.x), 1);
}

__global__ void outside_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, float(threadIdx.x), 1); }

__global__ void half_warps(float* out) {  // right: each half is a mask of its own
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  float sum = float(threadIdx.x);
  if (threadIdx.x % 32 < 16) {
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
  } else {
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
  }
  out[threadIdx.x] = sum;
}

__global__ void write_beyond(float* out) { out[threadIdx.x + 1] = 1; }

struct alignas(16) Four { float v[4]; };
__global__ void read_unaligned(const float* in, float* out) {
  out[threadIdx.x] = reinterpret_cast<const Four*>(in + 1)->v[threadIdx.x % 4];
}

std::unique_ptr<float[]> in, out;

bool reversed() {
  for (int i = 0; i < kThreads; ++i)
    if (out[size_t(i)] != float(kThreads - 1 - i)) return false;
  return true;
}

template <class F> bool refused(F f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  in.reset(new float[kThreads]), out.reset(new float[kThreads]);
  for (int i = 0; i < kThreads; ++i) in[size_t(i)] = float(i), out[size_t(i)] = -1;
  const float* from = in.get();
  float* to = out.get();
  const auto reverse = [&](bool barrier) { shim::launch(1, kThreads, 0, reverse_in_shared, from, to, barrier); };
  bool right = false;
  if (what == "barrier") reverse(true), right = reversed(), shim::reverse = true, reverse(true), right &= reversed();
  else if (what == "dynamic-shared")
    shim::launch(1, kThreads, kThreads * sizeof(float), reverse_in_dynamic_shared, from, to), right = reversed();
  else if (what == "missing-barrier") reverse(false), right = !reversed();
  else if (what == "unwritten-shared")
    shim::launch(1, kThreads, 0, read_unwritten, to), right = std::isnan(to[0]) && to[1] == 1;
  else if (what == "divergent-barrier") right = refused([] { shim::launch(1, kThreads, 0, two_barriers); });
  else if (what == "missing-lane") right = refused([&] { shim::launch(1, kThreads, 0, missing_lane, to); });
  else if (what == "outside-mask") right = refused([&] { shim::launch(1, kThreads, 0, outside_mask, to); });
  else if (what == "half-warps")
    shim::launch(1, kThreads, 0, half_warps, to), right = to[0] == 120 && to[16] == 376 && to[63] == 888;
  else if (what == "write-beyond") shim::launch(1, kThreads, 0, write_beyond, to);  // the address sanitizer ends it
  else if (what == "read-unaligned") shim::launch(1, kThreads, 0, read_unaligned, from, to);  // so does the other one
  std::printf("%s\n", right ? "right" : "not noticed");
  return right ? 0 : 1;
}
