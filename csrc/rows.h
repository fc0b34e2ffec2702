// Shared by operators that compute a few numbers per row: cache slots, and on CUDA one thread per row.
#pragma once

#include <cstdint>

#include "lanes.h"

#ifdef __CUDACC__
#include "launch.h"
#endif

namespace easyspec {

// The cache slot of a position, from its request's blocks, `[width]`. A position past the table uses the last block.
EASYSPEC_BODY int64_t slot_of(const int32_t* blocks, int64_t width, int64_t block_size, int64_t position) {
  const int64_t column = position / block_size, last = width - 1;
  return static_cast<int64_t>(blocks[column < last ? column : last]) * block_size + position % block_size;
}

#ifdef __CUDACC__
// Calls `do_row(args, row)`, one thread per row: there are few, and a launch costs more than the work.
template <class Args>
__global__ void rows_kernel(Args args) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (row < args.rows) do_row(args, row);
}

template <class Args>
void launch_rows(const Args& args, void* stream) {
  constexpr int kThreads = 64;
  const auto blocks = static_cast<unsigned>((args.rows + kThreads - 1) / kThreads);
  launch(rows_kernel<Args>, blocks, kThreads, 0, stream, 1, args);
}
#endif

}  // namespace easyspec
