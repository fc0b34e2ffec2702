// Lets a kernel's body be written once for both devices: lanes that divide its work, and the number formats.
//
// On the host one lane does all the work. On a GPU the lanes of a warp, or the threads of a block, take elements in
// turn.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EASYSPEC_BODY __host__ __device__ __forceinline__
#define EASYSPEC_SUM_IN_ANY_ORDER(sum)
#define EASYSPEC_INDEPENDENT
#else
#include <bit>
#define EASYSPEC_BODY inline __attribute__((always_inline))
#define EASYSPEC_PRAGMA(text) _Pragma(#text)
#define EASYSPEC_SUM_IN_ANY_ORDER(sum) EASYSPEC_PRAGMA(omp simd reduction(+ : sum))
#define EASYSPEC_INDEPENDENT _Pragma("omp simd")
#endif

namespace easyspec {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

EASYSPEC_BODY float to_float(float x) { return x; }

EASYSPEC_BODY float to_float(BFloat16 x) {
#ifdef __CUDACC__
  return __bfloat162float(__nv_bfloat16_raw{x.bits});
#else
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
#endif
}

EASYSPEC_BODY float to_float(Float16 x) {
#ifdef __CUDACC__
  return __half2float(__half_raw{x.bits});
#else
  return static_cast<float>(std::bit_cast<_Float16>(x.bits));
#endif
}

EASYSPEC_BODY void from_float(float x, float& out) { out = x; }

// Rounds to nearest, ties to even; NaN stays NaN.
EASYSPEC_BODY void from_float(float x, BFloat16& out) {
#ifdef __CUDACC__
  out.bits = __nv_bfloat16_raw(__float2bfloat16_rn(x)).x;
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
#endif
}

EASYSPEC_BODY void from_float(float x, Float16& out) {
#ifdef __CUDACC__
  out.bits = __half_raw(__float2half_rn(x)).x;
#else
  out.bits = std::bit_cast<uint16_t>(static_cast<_Float16>(x));
#endif
}

// x rounded to T.
template <class T>
EASYSPEC_BODY float rounded(float x) {
  T stored;
  from_float(x, stored);
  return to_float(stored);
}

struct HostLane {
  EASYSPEC_BODY int64_t first() const { return 0; }
  EASYSPEC_BODY int64_t step() const { return 1; }
  EASYSPEC_BODY float sum(float x) const { return x; }
};

#ifdef __CUDACC__
struct WarpLanes {
  __device__ __forceinline__ int64_t first() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int64_t step() const { return 32; }
  __device__ __forceinline__ float sum(float x) const {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
  }
};

// All threads of a block. `sum` may be called only once, since it does not protect its shared memory for reuse.
template <unsigned kThreads>
struct BlockLanes {
  __device__ __forceinline__ int64_t first() const { return threadIdx.x; }
  __device__ __forceinline__ int64_t step() const { return kThreads; }
  __device__ __forceinline__ float sum(float x) const {
    __shared__ float of_warps[kThreads / 32];
    x = WarpLanes{}.sum(x);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (const float part : of_warps) total += part;
    return total;
  }
};
#endif

// Calls f(T{}) with the type of `dtype`.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace easyspec
