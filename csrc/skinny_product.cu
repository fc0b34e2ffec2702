#include <cooperative_groups.h>

#include <algorithm>

#include "launch.h"
#include "skinny_product.h"

namespace easyspec {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 64;  // per tile: 128 bytes of a row, one memory transaction
constexpr int kRows = 16;     // per slice, which a warp multiplies at once
constexpr int kStages = 4;    // slices whose weights a warp prefetches
constexpr int kSliceBytes = kRows * kColumns * 2;
constexpr int kRing = kWarps * kStages * kSliceBytes;
constexpr int kMostBlocks = 8;  // per cluster, which divide a tile's rows: the portable limit

// Rows whose inputs are in shared memory together, for up to 8 and up to 16 tokens.
template <int kTokenTiles>
constexpr int kChunk = 2048 / kTokenTiles;

// The layout of a block's dynamic shared memory, in bytes from its start: first the prefetched slices, and once all
// have arrived the sums of the warps [kWarps, tokens, kColumns].
struct Layout {
  int pitch;      // elements between the inputs of two tokens
  int inputs;     // [tokens, pitch] bfloat16
  int of_blocks;  // sums of the cluster's blocks [blocks, tokens, kColumns] float32, in its first block
  int squares;    // sums of squares of the blocks [blocks, tokens], then of the warps [kWarps, tokens], float32
  int bytes;

  __host__ __device__ Layout(int rows, int tokens, int blocks)
      // 8 modulo 64, so that the threads of a warp read from different banks.
      : pitch((rows + 63) / 64 * 64 + 8),
        inputs(kRing),
        of_blocks(inputs + tokens * pitch * 2),
        squares(of_blocks + blocks * tokens * kColumns * 4),
        bytes(squares + (blocks + kWarps) * tokens * 4) {}
};

// What the host computes for all blocks. The number of blocks per cluster is a power of two: 1 << log_blocks.
struct Shares {
  int log_blocks;
  int slices;  // per layer
  int rows_together;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory; of zeros if `is_there` is false.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool is_there) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all copies except those of the last kStages - 1 groups.
__device__ __forceinline__ void wait_for_oldest_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
#endif
}

// Weights [16 rows, 16 columns] of a slice as a fragment [16 columns, 16 rows]; each lane gives the address of 8
// numbers.
__device__ __forceinline__ void load_turned(uint32_t (&fragment)[4], uint32_t address) {
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
#endif
}

// sums [16 columns, 8 tokens] += weights [16 columns, 16 rows] times inputs [16 rows, 8 tokens], by the warp.
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&weights)[4], uint2 inputs) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(inputs.x), "r"(inputs.y));
#endif
}

__device__ __forceinline__ uint32_t packed(float low, float high) {
  BFloat16 a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
__device__ __forceinline__ float low_of(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_of(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// A tile of columns of one layer. The blocks of a cluster divide its rows, the warps of a block theirs, slice by slice.
//
// Each warp has a ring of slices in shared memory that only it writes and reads. Part p (an eighth) of a slice's row is
// stored at place p ^ (row % 8), so that the same part of eight rows is in different banks. Warps share only the inputs
// and the sums. The norm's factor is one number per token, so it multiplies the sums; each block sums the squares of
// its own rows.
template <int kTokenTiles, bool kGated>
__global__ void __launch_bounds__(kThreads, 3 - (kTokenTiles > 1)) skinny_product_kernel(SkinnyProduct a, Shares s) {
  extern __shared__ __align__(128) char shared[];
  let_next_start();
  const int blocks = 1 << s.log_blocks;
#if __CUDA_ARCH__ >= 900
  auto cluster = cooperative_groups::this_cluster();
  if (blocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;");  // this block has started
#endif

  const int block = blockIdx.x & (blocks - 1), tile = blockIdx.x >> s.log_blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  const int tokens = static_cast<int>(a.tokens), columns = static_cast<int>(a.columns);
  const int from_first = static_cast<int>(blockIdx.y) - static_cast<int>(a.first), step = static_cast<int>(a.step);
  const int layer = step == 1 ? from_first : from_first / step;
  const bool is_here = from_first >= 0 && layer < a.layers && layer * step == from_first;
  const int width = kGated ? columns / 2 : columns;        // of the result
  constexpr int kWide = kGated ? kColumns / 2 : kColumns;  // columns of the result per tile
  const int begin = (s.slices * block >> s.log_blocks) * kRows;
  const int end = min(static_cast<int>(a.inner), (s.slices * (block + 1) >> s.log_blocks) * kRows);
  const int rows = is_here ? end - begin : 0, slices = (rows + kRows - 1) / kRows;
  const Layout layout(s.rows_together, tokens, blocks);
  auto* inputs = reinterpret_cast<uint16_t*>(shared + layout.inputs);
  auto* of_warps = reinterpret_cast<float*>(shared);
  auto* of_blocks = reinterpret_cast<float*>(shared + layout.of_blocks);
  auto* squares_of_blocks = reinterpret_cast<float*>(shared + layout.squares);
  float* squares_of_warps = squares_of_blocks + blocks * tokens;

  // A lane copies an eighth of every fourth row. Of gated columns half of the eighths are gates, half values.
  const int part = lane % 8, first_row = lane / 8;
  const int place = tile * kWide + 8 * part % kWide;
  const int column = min(place, width - 8) + (kGated && 8 * part >= kWide ? width : 0);
  const auto* weights =
      static_cast<const BFloat16*>(a.weights) + (layer * a.inner + begin + first_row) * a.columns + column;
  const int my_rows = place < width ? rows - first_row : 0;
  const uint32_t ring = shared_address(shared) + warp * kStages * kSliceBytes;
  auto fetch = [&](int slice, int stage) {
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int row = slice * kRows + 4 * i, in_slice = 4 * i + first_row;
      const bool is_there = row < my_rows;
      const auto* from = weights + (is_there ? static_cast<uint32_t>(row) * static_cast<uint32_t>(columns) : 0u);
      copy_async(ring + stage * kSliceBytes + in_slice * kColumns * 2 + (part ^ in_slice % 8) * 16, from, is_there);
    }
    end_of_copies();
  };
  if (is_here) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) fetch(warp + stage * kWarps, stage);
  }
  const auto* norms = static_cast<const BFloat16*>(a.norms) + layer * a.inner + begin;
  uint4 first_norm = {};
  if (a.norms && 8 * static_cast<int>(threadIdx.x) < rows) {
    first_norm = *reinterpret_cast<const uint4*>(norms + 8 * threadIdx.x);
  }
  wait_for_previous();

  const auto* x = static_cast<const BFloat16*>(a.x) + layer * a.layer_step + begin;
  float sums[kTokenTiles][4][4] = {};
  int slice = warp, stage = 0;
  for (int chunk = 0; chunk < rows; chunk += kChunk<kTokenTiles>) {
    const int chunk_end = min(slices * kRows, chunk + kChunk<kTokenTiles>);
    if (chunk > 0) __syncthreads();  // the inputs of the previous chunk have been read
    // The inputs times the norm's weights, 8 rows per thread at a time.
    for (int token = 0; token < tokens; ++token) {
      float square = 0;
      for (int row = chunk + 8 * threadIdx.x; row < chunk_end; row += 8 * kThreads) {
        uint4 numbers = {};
        if (row < rows) numbers = *reinterpret_cast<const uint4*>(x + token * a.token_step + row);
        if (a.norms && row < rows) {
          const bool is_first = chunk == 0 && row < 8 * kThreads;
          const uint4 norm = is_first ? first_norm : *reinterpret_cast<const uint4*>(norms + row);
          const uint32_t factors[4] = {norm.x, norm.y, norm.z, norm.w};
          uint32_t words[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float low = low_of(words[i]), high = high_of(words[i]);
            square += low * low + high * high;
            words[i] = packed(low * low_of(factors[i]), high * high_of(factors[i]));
          }
          numbers = {words[0], words[1], words[2], words[3]};
        }
        *reinterpret_cast<uint4*>(inputs + token * layout.pitch + row - chunk) = numbers;
      }
      if (a.norms) {
        square = WarpLanes{}.sum(square);
        float& of_warp = squares_of_warps[warp * tokens + token];
        if (lane == 0) of_warp = square + (chunk > 0 ? of_warp : 0);
      }
    }
    __syncthreads();

    for (; slice * kRows < chunk_end; slice += kWarps, stage = (stage + 1) % kStages) {
      wait_for_oldest_copies();
      __syncwarp();
      uint2 factors[kTokenTiles] = {};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const int token = 8 * t + group;
        if (token < tokens) {
          const auto* from = inputs + token * layout.pitch + slice * kRows - chunk + 2 * quarter;
          factors[t] = {*reinterpret_cast<const uint32_t*>(from), *reinterpret_cast<const uint32_t*>(from + 8)};
        }
      }
      // Lanes 0 to 7 address the first eight rows of columns 0 to 7, the next those of 8 to 15, then the last eight
      // rows.
      const int row = lane % 8 + lane / 16 * 8;
      const uint32_t of_row = ring + stage * kSliceBytes + row * kColumns * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t fragment[4];
        load_turned(fragment, of_row + ((2 * i + lane / 8 % 2) ^ row % 8) * 16);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) multiply(sums[t][i], fragment, factors[t]);
      }
      __syncwarp();
      fetch(slice + kStages * kWarps, stage);
    }
  }

  // Over the warps, then over the blocks of the cluster, in a fixed order.
  __syncthreads();  // no copy is pending, and the ring's memory becomes the warps' sums
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int of_four = 0; of_four < 4; ++of_four) {
        const int token = 8 * t + 2 * quarter + of_four % 2, at = 16 * i + group + of_four / 2 * 8;
        if (token < tokens) of_warps[(warp * tokens + token) * kColumns + at] = sums[t][i][of_four];
      }
    }
  }
  __syncthreads();
  float *totals = of_blocks, *total_squares = squares_of_blocks;  // the first block's
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // all blocks run: the first one's memory exists
    totals = cluster.map_shared_rank(of_blocks, 0);
    total_squares = cluster.map_shared_rank(squares_of_blocks, 0);
  }
#endif
  for (int i = threadIdx.x; i < tokens * kColumns; i += kThreads) {
    float total = 0;
    for (int other = 0; other < kWarps; ++other) total += of_warps[other * tokens * kColumns + i];
    totals[block * tokens * kColumns + i] = total;
  }
  if (a.norms && threadIdx.x < tokens) {
    float total = 0;
    for (int other = 0; other < kWarps; ++other) total += squares_of_warps[other * tokens + threadIdx.x];
    total_squares[block * tokens + threadIdx.x] = total;
  }
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    cluster.sync();
  } else {
    __syncthreads();
  }
#else
  __syncthreads();
#endif
  if (block != 0) return;

  const auto* bias = static_cast<const BFloat16*>(a.bias) + layer * a.columns;
  const auto* residual = static_cast<const BFloat16*>(a.residual);
  auto* out = static_cast<BFloat16*>(a.out) + blockIdx.y * a.out_layer_step;
  for (int i = threadIdx.x; i < tokens * kWide; i += kThreads) {
    const int token = i / kWide, at = tile * kWide + i % kWide;
    if (at >= width) continue;
    float result = 0;
    if (is_here) {
      float factor = 1;
      if (a.norms) {
        float total = 0;
        for (int other = 0; other < blocks; ++other) total += squares_of_blocks[other * tokens + token];
        factor = 1 / sqrtf(total / static_cast<float>(a.inner) + a.eps);
      }
      auto total_at = [&](int place_in_tile, int of_bias) {
        float total = 0;
        for (int other = 0; other < blocks; ++other) {
          total += of_blocks[(other * tokens + token) * kColumns + place_in_tile];
        }
        return total * factor + (a.bias ? to_float(bias[of_bias]) : 0);
      };
      result = total_at(i % kWide, at);
      if constexpr (kGated) {
        result = result / (1 + expf(-result)) * total_at(kWide + i % kWide, width + at);
      } else if (residual) {
        result += to_float(residual[token * static_cast<int64_t>(width) + at]);
      }
    }
    from_float(result, out[token * a.out_token_step + at]);
  }
}

template <int kTokenTiles>
void launch_tokens(const SkinnyProduct& a, void* stream) {
  const int wide = a.gated ? kColumns / 2 : kColumns, width = static_cast<int>(a.gated ? a.columns / 2 : a.columns);
  const int tiles = (width + wide - 1) / wide, slices = static_cast<int>((a.inner + kRows - 1) / kRows);
  const DeviceProperties& device = device_properties();
  // More blocks divide a tile's rows as long as there are at most one and a half per multiprocessor, so that the next
  // kernel's blocks find room, and as long as each warp has a slice.
  int log_blocks = 0;
  while (2 << log_blocks <= kMostBlocks && tiles * a.layers << (log_blocks + 1) <= device.multiprocessors * 3 / 2 &&
         slices >= kWarps << (log_blocks + 1)) {
    ++log_blocks;
  }
  const int blocks = 1 << log_blocks, of_block = (slices + blocks - 1) / blocks * kRows;
  const Shares shares{log_blocks, slices, std::min(of_block, kChunk<kTokenTiles>)};
  const Layout layout(shares.rows_together, static_cast<int>(a.tokens), blocks);
  const auto kernel = a.gated ? skinny_product_kernel<kTokenTiles, true> : skinny_product_kernel<kTokenTiles, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.bytes);
  const dim3 grid(static_cast<unsigned>(tiles << log_blocks), static_cast<unsigned>(a.outputs));
  launch(kernel, grid, kThreads, layout.bytes, stream, blocks, a, shares);
}

}  // namespace

const char* why_not_skinny(const SkinnyProduct& args) {
  if (args.dtype != DType::kBFloat16) return "it is not in bfloat16";
  if (args.tokens > kSkinnyTokens) return "there are more than 16 tokens";
  if (args.inner % 8 || args.token_step % 8 || (args.gated ? args.columns / 2 : args.columns) % 8) {
    return "its rows or columns are no whole number of 16 bytes";
  }
  for (const void* start : {args.x, args.weights, args.norms}) {
    if (reinterpret_cast<uintptr_t>(start) % 16) return "its inputs do not begin at a multiple of 16 bytes";
  }
  if (args.inner * args.columns >= int64_t{1} << 32) return "its weights are too large";
  if (!device_properties().is_hopper_or_newer) return "the GPU is older than Hopper";
  return nullptr;
}

void skinny_product_cuda(const SkinnyProduct& args, void* stream) {
  if (args.tokens == 0 || args.outputs == 0) return;
  if (args.tokens <= 8) {
    launch_tokens<1>(args, stream);
  } else {
    launch_tokens<2>(args, stream);
  }
}

}  // namespace easyspec
