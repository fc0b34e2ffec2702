#include <cuda_runtime.h>

#include "repeat_for_layers.h"

namespace easyspec {

__global__ void repeat_for_layers_kernel(RepeatForLayers args, int64_t elements) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < elements) repeat_at(args, i);
}

void repeat_for_layers_cuda(const RepeatForLayers& args, void* stream) {
  constexpr unsigned kThreads = 256;
  const int64_t elements = num_elements(args);
  const auto blocks = static_cast<unsigned>((elements + kThreads - 1) / kThreads);
  repeat_for_layers_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, elements);
}

}  // namespace easyspec
