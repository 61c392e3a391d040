// Boxes (x1, y1, x2, y2) in one arithmetic, bit for bit the same on the CPU and in CUDA kernels: every operation is rounded
// once, no product is fused into a sum. Includes nothing but <cstdint>: for per-ISA kernels, nvcc and the host shim.
#pragma once
#include <cstdint>

#ifndef NASDET_HD
#if defined(__CUDACC__)
#define NASDET_HD __host__ __device__ __forceinline__
#else
#define NASDET_HD \
  __attribute__((always_inline)) inline  // never a copy of one instruction set that the linker could keep for all
#endif
#endif

namespace nasdet {

template <class T> struct Box { T x1, y1, x2, y2; };

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float rounded_quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double rounded_quotient(double a, double b) { return __ddiv_rn(a, b); }
#else
template <class T> NASDET_HD T rounded_product(T a, T b) {
  T product = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(product));  // hides that it is a product from -ffp-contract=fast
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  volatile T stored = product;
  product = stored;
#endif
  return product;
}
template <class T> NASDET_HD T rounded_quotient(T a, T b) { return a / b; }
#endif

template <class T> NASDET_HD T larger(T a, T b) { return a < b ? b : a; }  // `a` when either is NaN
template <class T> NASDET_HD T smaller(T a, T b) { return b < a ? b : a; }

// Signed: negative when exactly one side is inverted.
template <class T> NASDET_HD T box_area(const Box<T>& box) { return rounded_product(box.x2 - box.x1, box.y2 - box.y1); }

template <class T> NASDET_HD T intersection_area(const Box<T>& a, const Box<T>& b) {
  const T width = larger(T(0), smaller(a.x2, b.x2) - larger(a.x1, b.x1));
  const T height = larger(T(0), smaller(a.y2, b.y2) - larger(a.y1, b.y1));
  return rounded_product(width, height);
}

// Intersection over union; NaN for two boxes without area (0 / 0) and whenever a coordinate is NaN. Symmetric.
template <class T> NASDET_HD T box_iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T intersection = intersection_area(a, b);
  return rounded_quotient(intersection, (area_a + area_b) - intersection);
}

// Integers whose ascending order is the order of suppression: score descending, NaN first, -0 equal to 0.
NASDET_HD uint32_t descending_key(float score) {
  if (score != score) return 0;
  const float value = score + 0.0f;  // -0 + 0 = 0
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(value);
#else
  __builtin_memcpy(&bits, &value, 4);
#endif
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
NASDET_HD uint64_t descending_key(double score) {
  if (score != score) return 0;
  const double value = score + 0.0;
  uint64_t bits;
#if defined(__CUDA_ARCH__)
  bits = uint64_t(__double_as_longlong(value));
#else
  __builtin_memcpy(&bits, &value, 8);
#endif
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffu;
}

}  // namespace nasdet
