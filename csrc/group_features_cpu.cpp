#include "group_features.h"

namespace easyspec {

void group_features_cpu(const GroupFeatures& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t token = begin; token < end; ++token) group_features_token<decltype(type)>(args, token, HostLane{});
  });
}

}  // namespace easyspec
