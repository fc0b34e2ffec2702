#include "launch.h"
#include "rotate_and_store.h"

namespace easyspec {

// One warp per head of a row.
template <class T>
__global__ void rotate_and_store_kernel(RotateAndStore args, int64_t heads) {
  let_next_start();
  wait_for_previous();
  const int64_t warp = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (warp < args.rows * heads) rotate_and_store_head<T>(args, warp / heads, warp % heads, WarpLanes{});
}

void rotate_and_store_cuda(const RotateAndStore& args, void* stream) {
  constexpr unsigned kWarps = 4;
  const int64_t heads = args.heads + (args.cache ? 2 : 1) * args.kv_heads;
  const auto blocks = static_cast<unsigned>((args.rows * heads + kWarps - 1) / kWarps);
  with_type(args.dtype, [&](auto type) {
    launch(rotate_and_store_kernel<decltype(type)>, blocks, dim3(32, kWarps), 0, stream, 1, args, heads);
  });
}

}  // namespace easyspec
