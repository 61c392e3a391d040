// How kernels hold elements: the type of their arithmetic, conversions, packs that move as one load, dynamic shared memory.
// No torch and no runtime header: tests compile this file with g++ and run kernels on the CPU.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define NASDET_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
#endif

namespace nasdet::cuda {

template <class S> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <class S> using arithmetic_t = typename Arithmetic<S>::type;

template <class T, class S> __device__ __forceinline__ T widen(S v) { return T(v); }
template <> __device__ __forceinline__ float widen<float>(__half v) { return __half2float(v); }
template <> __device__ __forceinline__ float widen<float>(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class S, class T> __device__ __forceinline__ S narrow(T v) { return S(v); }
template <> __device__ __forceinline__ __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// kWidth elements that move as one load or store: 16 bytes, or one element where the maps are not aligned to that.
template <class S, int kWidth> struct alignas(sizeof(S) * kWidth) Pack { S v[kWidth]; };
template <class S> constexpr int kWide = int(16 / sizeof(S));

}  // namespace nasdet::cuda
