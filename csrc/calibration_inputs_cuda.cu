#include <cuda_runtime.h>

#include "calibration_inputs.h"

namespace easyspec {

// A thread a row: decoding requests have few rows, and a prompt's pass costs far more than this.
__global__ void calibration_inputs_kernel(CalibrationInputs args) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (row < args.rows) calibration_row(args, row);
}

void calibration_inputs_cuda(const CalibrationInputs& args, void* stream) {
  constexpr int kThreads = 64;
  const auto blocks = static_cast<unsigned>((args.rows + kThreads - 1) / kThreads);
  calibration_inputs_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
}

}  // namespace easyspec
