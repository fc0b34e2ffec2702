#include "group_rms_norm.h"

#include "binding.h"

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

namespace {

Tensor group_rms_norm(const Tensor& x, const Tensor& weights, double eps) {
  STD_TORCH_CHECK(weights.dim() == 2 && x.dim() >= 2 && x.dim() <= 3,
                  "x or weights has the wrong number of dimensions");
  const int64_t layers = weights.size(0), tokens = x.size(x.dim() - 2), hidden = weights.size(1);
  const bool shared = x.dim() == 2;
  check_contiguous(x, "x", x.scalar_type(), (shared ? 1 : layers) * tokens * hidden);
  check_contiguous(weights, "weights", x.scalar_type(), layers * hidden);
  Tensor out = torch::stable::new_empty(x, {layers, tokens, hidden});
  const GroupRmsNorm args{
      .x = x.data_ptr(),
      .weights = weights.data_ptr(),
      .out = out.data_ptr(),
      .layers = layers,
      .tokens = tokens,
      .hidden = hidden,
      .shared = shared,
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(x, "x"),
  };
  const int64_t rows = (shared ? 1 : layers) * tokens;
  if (rows == 0) return out;
#ifdef EASYSPEC_CUDA
  if (x.is_cuda()) {
    on_device_of(x, [&](void* stream) { group_rms_norm_cuda(args, stream); });
    return out;
  }
#endif
  run_phase(group_rms_norm_cpu, args, rows, hidden * (shared ? layers : 1));
  return out;
}

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(group_rms_norm)
