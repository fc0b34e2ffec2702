#include "group_rms_norm.h"

namespace easyspec {

void group_rms_norm_cpu(const GroupRmsNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t layer = row / args.tokens;  // 0 if all layers share the token
      const int64_t last = args.shared ? args.layers : layer + 1;
      group_rms_norm_token<decltype(type)>(args, row % args.tokens, layer, last, HostLane{});
    }
  });
}

}  // namespace easyspec
