#include <cooperative_groups.h>

#include <algorithm>
#include <cstdlib>

#include "launch.h"
#include "skinny_product.h"

namespace easyspec {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 64;  // of a tile: eight groups of eight, 16 bytes each
constexpr int kRows = 16;     // of a slice, which a warp multiplies at once
constexpr int kDepth = 3;     // slices of a warp whose weights are on their way
// Slices whose inputs are in shared memory together, of up to 8 and up to 16 tokens: whole turns of the warps.
template <int kTokenTiles>
constexpr int kChunk = 10 * kDepth * kWarps / kTokenTiles;
constexpr int kMostBlocks = 8;  // of a cluster, which share a tile's rows: the portable limit

// Where a block's dynamic shared memory holds what.
struct Layout {
  int pitch;      // numbers from a token's inputs to the next token's
  int inputs;     // bytes: the inputs [tokens, pitch], and afterwards the sums of the warps [kWarps, tokens, kColumns]
  int of_blocks;  // bytes: the sums of the cluster's blocks [blocks, tokens, kColumns], in its first block
  int squares;    // bytes: sums of squares of the blocks [blocks, tokens], then of the warps [kWarps, tokens]

  __host__ __device__ Layout(int64_t rows, int64_t tokens, int blocks)
      // Tokens 16 numbers apart modulo 64, so that the threads of a warp read from different banks.
      : pitch(static_cast<int>((rows + 63) / 64 * 64 + 16)),
        inputs(static_cast<int>(tokens * (pitch * 2 > kWarps * kColumns * 4 ? pitch * 2 : kWarps * kColumns * 4))),
        of_blocks(static_cast<int>(blocks * tokens * kColumns * 4)),
        squares(static_cast<int>((blocks + kWarps) * tokens * 4)) {}

  __host__ __device__ int bytes() const { return inputs + of_blocks + squares; }
};

// Rows of a block whose inputs are in shared memory at once.
template <int kTokenTiles>
__host__ __device__ int64_t rows_together(int64_t slices, int blocks) {
  const int64_t of_block = (slices + blocks - 1) / blocks;
  return kRows * (of_block < kChunk<kTokenTiles> ? of_block : kChunk<kTokenTiles>);
}

// 16 bytes of weights: read once, so they need not stay in the first cache.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(from));
  return out;
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

// A tile of columns of one layer, its rows shared by the blocks of a cluster, a block's by its warps, slice by slice.
//
// In a slice thread `4 * group + quarter` of a warp reads columns `8 * group ..` of rows `4 * quarter ..`, four times
// 16 bytes, which is what the tensor cores' fragments hold, once columns and rows are numbered to suit: column `2 * i`
// of a group is fragment row `group` of product i, column `2 * i + 1` is row `group + 8`, and rows `4 * quarter + (0,
// 1, 2, 3)` are the inner places `2 * quarter + (0, 1, 8, 9)`.
//
// The norm's factor is one number a token, so it multiplies the sums; each block adds up the squares of its own rows.
template <int kTokenTiles, bool kGated>
__global__ void __launch_bounds__(kThreads, kTokenTiles == 1 ? 3 : 2)
    skinny_product_kernel(SkinnyProduct a, int blocks) {
  extern __shared__ uint4 shared[];
  let_next_start();
#if __CUDA_ARCH__ >= 900
  auto cluster = cooperative_groups::this_cluster();
  if (blocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;");  // this block runs
#endif

  const int block = blockIdx.x % blocks, tile = blockIdx.x / blocks;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
  const int tokens = static_cast<int>(a.tokens);
  const int64_t layer = (static_cast<int64_t>(blockIdx.y) - a.first) / a.step;
  const bool is_here = blockIdx.y >= a.first && (blockIdx.y - a.first) % a.step == 0 && layer < a.layers;
  const int64_t width = kGated ? a.columns / 2 : a.columns;  // of the result
  constexpr int kWide = kGated ? kColumns / 2 : kColumns;    // the result's columns of a tile
  // Of gated ones half of the groups take gates, and half what they let through.
  const int64_t place = tile * static_cast<int64_t>(kWide) + 8 * group % kWide;
  const int64_t column = place + (kGated && 8 * group >= kWide ? width : 0);
  const int64_t all_slices = (a.inner + kRows - 1) / kRows;
  const int64_t begin = all_slices * block / blocks * kRows;
  const int64_t end = min(a.inner, all_slices * (block + 1) / blocks * kRows);
  const int rows = is_here ? static_cast<int>(end - begin) : 0, slices = (rows + kRows - 1) / kRows;
  const Layout layout(rows_together<kTokenTiles>(all_slices, blocks), tokens, blocks);
  auto* inputs = reinterpret_cast<uint16_t*>(shared);
  auto* of_warps = reinterpret_cast<float*>(shared);
  auto* of_blocks = reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + layout.inputs);
  float* squares_of_blocks = of_blocks + blocks * tokens * kColumns;
  float* squares_of_warps = squares_of_blocks + blocks * tokens;

  const auto columns = static_cast<uint32_t>(a.columns);
  const auto* weights =
      static_cast<const BFloat16*>(a.weights) + (layer * a.inner + begin + 4 * quarter) * a.columns + column;
  const auto* norms = static_cast<const BFloat16*>(a.norms) + layer * a.inner + begin;
  const int my_rows = place < width ? rows - 4 * quarter : 0;
  auto load = [&](int slice, uint4(&into)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = slice * kRows + i;
      into[i] = row < my_rows ? load_once(weights + row * columns) : uint4{0, 0, 0, 0};
    }
  };
  uint4 fetched[kDepth][4];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) load(warp + d * kWarps, fetched[d]);
  uint4 first_norm = {};
  if (a.norms && 8 * static_cast<int>(threadIdx.x) < rows) first_norm = load_once(norms + 8 * threadIdx.x);
  wait_for_previous();

  const auto* x = static_cast<const BFloat16*>(a.x) + layer * a.layer_step + begin;
  float sums[kTokenTiles][4][4] = {};
  for (int chunk = 0; chunk < slices; chunk += kChunk<kTokenTiles>) {
    const int chunk_end = min(slices, chunk + kChunk<kTokenTiles>);
    if (chunk > 0) __syncthreads();  // the inputs of the one before have been read
    // The inputs, times the norm's weights: 8 rows a thread at once.
    for (int token = 0; token < tokens; ++token) {
      float square = 0;
      for (int row = chunk * kRows + 8 * threadIdx.x; row < chunk_end * kRows; row += 8 * kThreads) {
        uint4 numbers = {};
        if (row < rows) numbers = *reinterpret_cast<const uint4*>(x + token * a.token_step + row);
        if (a.norms) {
          const uint4 norm = row < 8 * kThreads ? first_norm : load_once(norms + min(row, rows - 8));
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
        *reinterpret_cast<uint4*>(inputs + token * layout.pitch + row - chunk * kRows) = numbers;
      }
      if (a.norms) {
        square = WarpLanes{}.sum(square);
        float& of_warp = squares_of_warps[warp * tokens + token];
        if (threadIdx.x % 32 == 0) of_warp = square + (chunk > 0 ? of_warp : 0);
      }
    }
    __syncthreads();

    for (int first = chunk + warp; first < chunk_end; first += kDepth * kWarps) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int slice = first + d * kWarps;
        if (slice >= chunk_end) break;
        uint2 factors[kTokenTiles] = {};
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          const int token = 8 * t + group, row = (slice - chunk) * kRows + 4 * quarter;
          if (token < tokens) factors[t] = *reinterpret_cast<const uint2*>(inputs + token * layout.pitch + row);
        }
        const uint32_t of_rows[4][4] = {{fetched[d][0].x, fetched[d][0].y, fetched[d][0].z, fetched[d][0].w},
                                        {fetched[d][1].x, fetched[d][1].y, fetched[d][1].z, fetched[d][1].w},
                                        {fetched[d][2].x, fetched[d][2].y, fetched[d][2].z, fetched[d][2].w},
                                        {fetched[d][3].x, fetched[d][3].y, fetched[d][3].z, fetched[d][3].w}};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Two rows of one column make a word of a fragment.
          const uint32_t fragment[4] = {__byte_perm(of_rows[0][i], of_rows[1][i], 0x5410),
                                        __byte_perm(of_rows[0][i], of_rows[1][i], 0x7632),
                                        __byte_perm(of_rows[2][i], of_rows[3][i], 0x5410),
                                        __byte_perm(of_rows[2][i], of_rows[3][i], 0x7632)};
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) multiply(sums[t][i], fragment, factors[t]);
        }
        load(slice + kDepth * kWarps, fetched[d]);
      }
    }
  }

  // Over the warps, then over the blocks of the cluster, in a fixed order.
  __syncthreads();  // the inputs have been read
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int token = 8 * t + 2 * quarter + part % 2;
        if (token < tokens)
          of_warps[(warp * tokens + token) * kColumns + 8 * group + 2 * i + part / 2] = sums[t][i][part];
      }
    }
  }
  __syncthreads();
  float *totals = of_blocks, *total_squares = squares_of_blocks;  // the first block's
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // all blocks run, so the first one's memory is there
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
    const int token = i / kWide;
    const int64_t at = tile * static_cast<int64_t>(kWide) + i % kWide;
    if (at >= width) continue;
    float result = 0;
    if (is_here) {
      float factor = 1;
      if (a.norms) {
        float total = 0;
        for (int other = 0; other < blocks; ++other) total += squares_of_blocks[other * tokens + token];
        factor = 1 / sqrtf(total / static_cast<float>(a.inner) + a.eps);
      }
      auto total_at = [&](int place_in_tile, int64_t of_bias) {
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
        result += to_float(residual[token * width + at]);
      }
    }
    from_float(result, out[token * a.out_token_step + at]);
  }
}

int experiment(const char* name, int usual) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : usual;
}

template <int kTokenTiles>
void launch_tokens(const SkinnyProduct& a, void* stream) {
  const int64_t wide = a.gated ? kColumns / 2 : kColumns, width = a.gated ? a.columns / 2 : a.columns;
  const int64_t tiles = (width + wide - 1) / wide, slices = (a.inner + kRows - 1) / kRows;
  const DeviceProperties& device = device_properties();
  const int most = experiment("EASYSPEC_MOST", kMostBlocks), limit = experiment("EASYSPEC_LIMIT", 198);
  // Rows are shared by more blocks while there is room for them beside the next kernel's, each warp with a slice.
  int blocks = 1;
  while (blocks < most && tiles * a.layers * blocks * 2 <= limit && slices >= 2 * blocks * kWarps / 2) blocks *= 2;
  const Layout layout(rows_together<kTokenTiles>(slices, blocks), a.tokens, blocks);
  const auto kernel = a.gated ? skinny_product_kernel<kTokenTiles, true> : skinny_product_kernel<kTokenTiles, false>;
  if (layout.bytes() > 48 << 10) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.most_shared_memory);
  }
  const dim3 grid(static_cast<unsigned>(tiles * blocks), static_cast<unsigned>(a.outputs));
  launch(kernel, grid, kThreads, layout.bytes(), stream, blocks, a, blocks);
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
