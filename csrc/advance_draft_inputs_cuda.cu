#include <cuda_runtime.h>

#include "advance_draft_inputs.h"

namespace easyspec {

// A thread a row: a draft batch has few rows, and a launch costs more than its work.
__global__ void advance_draft_inputs_kernel(AdvanceDraftInputs args) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (row < args.rows) advance_row(args, row);
}

void advance_draft_inputs_cuda(const AdvanceDraftInputs& args, void* stream) {
  constexpr int kThreads = 64;
  const auto blocks = static_cast<unsigned>((args.rows + kThreads - 1) / kThreads);
  advance_draft_inputs_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
}

}  // namespace easyspec
