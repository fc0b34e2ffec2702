#include "rotate_and_store.h"

namespace easyspec {

void rotate_and_store_cpu(const RotateAndStore& args, int64_t begin, int64_t end) {
  const int64_t heads = args.heads + (args.cache ? 2 : 1) * args.kv_heads;
  with_type(args.dtype, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        rotate_and_store_head<decltype(type)>(args, row, head, HostLane{});
      }
    }
  });
}

}  // namespace easyspec
