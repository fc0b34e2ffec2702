#include "group_features.h"

#include "binding.h"

namespace easyspec {

void group_features_cpu(const GroupFeatures& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t token = begin; token < end; ++token) group_features_token<decltype(type)>(args, token, HostLane{});
  });
}

namespace {

Tensor group_features(const Tensor& h, const Tensor& previous, double eps) {
  STD_TORCH_CHECK(h.dim() == 2 && h.size(1) % 2 == 0, "h is not [tokens, hidden] with an even hidden");
  const int64_t tokens = h.size(0), hidden = h.size(1);
  check_contiguous(h, "h", h.scalar_type(), tokens * hidden);
  check_contiguous(previous, "previous", h.scalar_type(), tokens * hidden);
  Tensor out = torch::stable::new_empty(h, {tokens, 4 * hidden});
  const GroupFeatures args{
      .h = h.data_ptr(),
      .previous = previous.data_ptr(),
      .out = out.data_ptr(),
      .tokens = tokens,
      .hidden = hidden,
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(h, "h"),
  };
  if (tokens == 0) return out;
#ifdef EASYSPEC_CUDA
  if (h.is_cuda()) {
    on_device_of(h, [&](void* stream) { group_features_cuda(args, stream); });
    return out;
  }
#endif
  run_phase(group_features_cpu, args, tokens, 4 * hidden);
  return out;
}

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(group_features)
