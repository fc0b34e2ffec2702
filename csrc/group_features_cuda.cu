#include <cuda_runtime.h>

#include "group_features.h"

namespace easyspec {

constexpr unsigned kThreads = 256;

template <class T>
__global__ void group_features_kernel(GroupFeatures args) {
  group_features_token<T>(args, blockIdx.x, BlockLanes<kThreads>{});
}

void group_features_cuda(const GroupFeatures& args, void* stream) {
  const auto blocks = static_cast<unsigned>(args.tokens);
  with_type(args.dtype, [&](auto type) {
    group_features_kernel<decltype(type)><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  });
}

}  // namespace easyspec
