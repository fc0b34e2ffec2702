#include <cuda_runtime.h>

#include "group_rms_norm.h"

namespace easyspec {

// A warp a row.
template <class T>
__global__ void group_rms_norm_kernel(GroupRmsNorm args) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  const int64_t rows = args.shared ? args.tokens : args.layers * args.tokens;
  if (row < rows) group_rms_norm_row<T>(args, row, WarpLanes{});
}

void group_rms_norm_cuda(const GroupRmsNorm& args, void* stream) {
  constexpr unsigned kWarps = 4;
  const auto blocks = static_cast<unsigned>((num_rows(args) + kWarps - 1) / kWarps);
  with_type(args.dtype, [&](auto type) {
    group_rms_norm_kernel<decltype(type)><<<blocks, dim3(32, kWarps), 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
}

}  // namespace easyspec
