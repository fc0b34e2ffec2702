#include "group_rms_norm.h"

namespace easyspec {

void group_rms_norm_cpu(const GroupRmsNorm& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) group_rms_norm_row<decltype(type)>(args, row, HostLane{});
  });
}

}  // namespace easyspec
