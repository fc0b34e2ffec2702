#include "group_features.h"
#include "launch.h"

namespace easyspec {

constexpr unsigned kThreads = 256;

template <class T>
__global__ void group_features_kernel(GroupFeatures args) {
  let_next_start();
  wait_for_previous();
  group_features_token<T>(args, blockIdx.x, BlockLanes<kThreads>{});
}

void group_features_cuda(const GroupFeatures& args, void* stream) {
  const auto blocks = static_cast<unsigned>(args.tokens);
  with_type(args.dtype,
            [&](auto type) { launch(group_features_kernel<decltype(type)>, blocks, kThreads, 0, stream, 1, args); });
}

}  // namespace easyspec
