#include "launch.h"
#include "prefix_sums.h"

namespace easyspec {

template <class T>
__global__ void prefix_sums_kernel(PrefixSums args) {
  let_next_start();
  wait_for_previous();
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < args.size) prefix_sums_at<T>(args, i);
}

void prefix_sums_cuda(const PrefixSums& args, void* stream) {
  constexpr unsigned kThreads = 256;
  const auto blocks = static_cast<unsigned>((args.size + kThreads - 1) / kThreads);
  with_type(args.dtype,
            [&](auto type) { launch(prefix_sums_kernel<decltype(type)>, blocks, kThreads, 0, stream, 1, args); });
}

}  // namespace easyspec
