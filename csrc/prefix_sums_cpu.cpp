#include "prefix_sums.h"

namespace easyspec {

void prefix_sums_cpu(const PrefixSums& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t i = begin; i < end; ++i) prefix_sums_at<decltype(type)>(args, i);
  });
}

}  // namespace easyspec
