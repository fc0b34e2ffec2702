#include "skinny_product.h"

#include <cooperative_groups.h>

#include <algorithm>

#include "launch.h"

namespace easyspec {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLanes = 8;                       // threads side by side along the columns, 16 bytes each
constexpr int kStep = kThreads / kLanes;        // rows of the matrix that a block reads at once
constexpr int kChunk = 512;                     // rows whose inputs are in shared memory together
constexpr int kMostBlocks = 8;                  // of a cluster, which share a tile's rows: the portable limit

template <class T>
constexpr int kVector = 16 / sizeof(T);
template <class T>
constexpr int kTile = kLanes * kVector<T>;      // columns of a block

// 16 bytes of weights: read once, so they need not stay in the first cache.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(from));
  return out;
}

// The numbers in 16 bytes.
__device__ __forceinline__ void unpack(uint4 bits, float (&out)[4], float) {
  out[0] = __uint_as_float(bits.x);
  out[1] = __uint_as_float(bits.y);
  out[2] = __uint_as_float(bits.z);
  out[3] = __uint_as_float(bits.w);
}
__device__ __forceinline__ void unpack(uint4 bits, float (&out)[8], BFloat16) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(uint4 bits, float (&out)[8], Float16) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
    out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

// A tile of columns of one layer, its rows shared by the blocks of a cluster. A thread holds sums of all tokens for 16
// bytes of columns; the 32 threads that hold the same columns, and then the blocks, add theirs up in a fixed order.
template <class T, int kTokens, bool kGated>
__global__ void __launch_bounds__(kThreads, 2) skinny_product_kernel(SkinnyProduct a, int blocks) {
  constexpr int V = kVector<T>, kColumns = kTile<T>;
  constexpr int kUnroll = kTokens > 2 ? 4 : 8;  // loads in flight of a thread
  __shared__ alignas(16) float inputs[kChunk][kTokens];
  __shared__ float of_warps[kWarps][kTokens][kColumns];
  __shared__ float sums[kTokens][kColumns];
  __shared__ float squares[kWarps];
  __shared__ float scales[kTokens];
  let_next_start();

  const int block = blockIdx.x % blocks, tile = blockIdx.x / blocks, lane = threadIdx.x % kLanes;
  const int64_t layer = (static_cast<int64_t>(blockIdx.y) - a.first) / a.step;
  const bool is_here = blockIdx.y >= a.first && (blockIdx.y - a.first) % a.step == 0 && layer < a.layers;
  const int64_t width = kGated ? a.columns / 2 : a.columns;  // of the result
  constexpr int kWide = kGated ? kColumns / 2 : kColumns;    // the result's columns of a tile
  // Of gated ones half of the lanes take gates, and half what they let through.
  const int64_t place = tile * static_cast<int64_t>(kWide) + (lane * V) % kWide;
  const int64_t column = place + (kGated && lane * V >= kWide ? width : 0);
  // Rows by whole steps, the last block's perhaps fewer.
  const int64_t steps = (a.inner + kStep - 1) / kStep;
  const int64_t begin = min(a.inner, steps * block / blocks * kStep);
  const int64_t end = is_here ? min(a.inner, steps * (block + 1) / blocks * kStep) : begin;
  const T* weights = static_cast<const T*>(a.weights) + layer * a.inner * a.columns + column;
  const bool is_inside = place < width;

  auto load = [&](int64_t first_row, uint4(&into)[kUnroll]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first_row + u * kStep + threadIdx.x / kLanes;
      into[u] = is_inside && row < end ? load_once(weights + row * a.columns) : uint4{0, 0, 0, 0};
    }
  };
  uint4 now[kUnroll];
  load(begin, now);
  wait_for_previous();

  const T* x = static_cast<const T*>(a.x) + layer * a.layer_step;
  const T* norms = static_cast<const T*>(a.norms) + layer * a.inner;
  if (a.norms && is_here) {
    // Each token's mean square, by an equal share of the threads.
    constexpr int kShare = kThreads / kTokens, kShareWarps = kWarps / kTokens;
    static_assert(kShareWarps >= 1);
    const int token = threadIdx.x / kShare;
    float sum = 0;
    if (token < a.tokens) {
      for (int64_t i = threadIdx.x % kShare; i < a.inner; i += kShare) {
        const float number = to_float(x[token * a.token_step + i]);
        sum += number * number;
      }
    }
    sum = WarpLanes{}.sum(sum);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < kTokens) {
      float total = 0;
      for (int i = 0; i < kShareWarps; ++i) total += squares[threadIdx.x * kShareWarps + i];
      scales[threadIdx.x] = 1 / sqrtf(total / static_cast<float>(a.inner) + a.eps);
    }
  }

  float acc[kTokens][V] = {};
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    __syncthreads();  // the chunk before has been read, the scales are written
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      for (int i = threadIdx.x; i < kChunk; i += kThreads) {
        const int64_t row = chunk + i;
        float number = 0;
        if (row < end && t < a.tokens) {
          number = to_float(x[t * a.token_step + row]);
          // Rounded as group_rms_norm rounds.
          if (a.norms) number = rounded<T>(rounded<T>(number * scales[t]) * to_float(norms[row]));
        }
        inputs[i][t] = number;
      }
    }
    __syncthreads();
    for (int base = 0; base < kChunk && chunk + base < end; base += kUnroll * kStep) {
      uint4 next[kUnroll];
      load(chunk + base + kUnroll * kStep, next);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float w[V];
        unpack(now[u], w, T{});
        const float* of_row = inputs[base + u * kStep + threadIdx.x / kLanes];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const float number = of_row[t];
#pragma unroll
          for (int v = 0; v < V; ++v) acc[t][v] += number * w[v];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) now[u] = next[u];
    }
  }

  // Over the rows of a warp, then over the warps, then over the blocks of the cluster.
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      for (int distance = kLanes; distance < 32; distance *= 2) {
        acc[t][v] += __shfl_xor_sync(0xffffffff, acc[t][v], distance);
      }
    }
  }
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int v = 0; v < V; ++v) of_warps[threadIdx.x / 32][t][lane * V + v] = acc[t][v];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
    float total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += of_warps[warp][i / kColumns][i % kColumns];
    sums[i / kColumns][i % kColumns] = total;
  }
#if __CUDA_ARCH__ >= 900
  auto cluster = cooperative_groups::this_cluster();
  if (blocks > 1) {
    cluster.sync();
  } else {
    __syncthreads();
  }
  auto total_at = [&](int token, int at) {
    float total = 0;
    for (int other = 0; other < blocks; ++other) {
      const float* theirs = blocks > 1 ? cluster.map_shared_rank(&sums[0][0], other) : &sums[0][0];
      total += theirs[token * kColumns + at];
    }
    return total;
  };
#else
  __syncthreads();
  auto total_at = [&](int token, int at) { return sums[token][at]; };
#endif
  // Each block of the cluster finishes a share of the results.
  const T* bias = static_cast<const T*>(a.bias) + layer * a.columns;
  for (int i = block * kThreads + threadIdx.x; i < kTokens * kWide; i += blocks * kThreads) {
    const int token = i / kWide;
    const int64_t at = tile * static_cast<int64_t>(kWide) + i % kWide;
    if (token >= a.tokens || at >= width) continue;
    float result = 0;
    if (is_here) {
      result = total_at(token, i % kWide) + (a.bias ? to_float(bias[at]) : 0);
      if constexpr (kGated) {
        const float through = total_at(token, kWide + i % kWide) + (a.bias ? to_float(bias[width + at]) : 0);
        result = result / (1 + expf(-result)) * through;
      } else if (a.residual) {
        result += to_float(static_cast<const T*>(a.residual)[token * width + at]);
      }
    }
    from_float(result, static_cast<T*>(a.out)[blockIdx.y * a.out_layer_step + token * a.out_token_step + at]);
  }
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) cluster.sync();  // others may still read this block's sums
#endif
}

template <class T, int kTokens>
void launch_tokens(const SkinnyProduct& a, void* stream) {
  const int64_t wide = a.gated ? kTile<T> / 2 : kTile<T>, width = a.gated ? a.columns / 2 : a.columns;
  const int64_t tiles = (width + wide - 1) / wide;
  const DeviceProperties& device = device_properties();
  // Enough blocks that each multiprocessor has one and most have two, none with hardly a row to read.
  int blocks = 1;
  while (device.is_hopper_or_newer && blocks < kMostBlocks && 2 * tiles * a.layers * blocks < 3 * device.multiprocessors &&
         a.inner >= 4 * kStep * blocks) {
    blocks *= 2;
  }
  const dim3 grid(static_cast<unsigned>(tiles * blocks), static_cast<unsigned>(a.outputs));
  const auto kernel = a.gated ? skinny_product_kernel<T, kTokens, true> : skinny_product_kernel<T, kTokens, false>;
  launch(kernel, grid, kThreads, stream, blocks, a, blocks);
}

}  // namespace

const char* why_not_skinny(const SkinnyProduct& args) {
  const int64_t vector = args.dtype == DType::kFloat32 ? 4 : 8;
  if (args.tokens > kSkinnyTokens) return "there are more than 8 tokens";
  if ((args.gated ? args.columns / 2 : args.columns) % vector) return "its columns are no whole number of 16 bytes";
  if (reinterpret_cast<uintptr_t>(args.weights) % 16) return "its weights do not begin at a multiple of 16 bytes";
  return nullptr;
}

void skinny_product_cuda(const SkinnyProduct& args, void* stream) {
  if (args.tokens == 0 || args.outputs == 0) return;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.tokens == 1) return launch_tokens<T, 1>(args, stream);
    if (args.tokens == 2) return launch_tokens<T, 2>(args, stream);
    if (args.tokens <= 4) return launch_tokens<T, 4>(args, stream);
    return launch_tokens<T, 8>(args, stream);
  });
}

}  // namespace easyspec
