#include "group_rms_norm.h"
#include "launch.h"

namespace easyspec {

constexpr unsigned kThreads = 256;

// One block per token and layer. Layers that share an input each compute its variance, which is faster than sharing it.
template <class T>
__global__ void group_rms_norm_kernel(GroupRmsNorm args) {
  let_next_start();
  wait_for_previous();
  const int64_t layer = blockIdx.x / args.tokens;
  group_rms_norm_token<T>(args, blockIdx.x % args.tokens, layer, layer + 1, BlockLanes<kThreads>{});
}

void group_rms_norm_cuda(const GroupRmsNorm& args, void* stream) {
  const auto blocks = static_cast<unsigned>(args.layers * args.tokens);
  with_type(args.dtype,
            [&](auto type) { launch(group_rms_norm_kernel<decltype(type)>, blocks, kThreads, 0, stream, 1, args); });
}

}  // namespace easyspec
