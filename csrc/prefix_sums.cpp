#include "prefix_sums.h"

#include "binding.h"

namespace easyspec {

void prefix_sums_cpu(const PrefixSums& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) {
    for (int64_t i = begin; i < end; ++i) prefix_sums_at<decltype(type)>(args, i);
  });
}

namespace {

Tensor prefix_sums(const Tensor& x, const Tensor& outputs) {
  STD_TORCH_CHECK(outputs.dim() == 3, "outputs is not [layers, tokens, hidden]");
  const int64_t layers = outputs.size(0), size = x.numel();
  check_contiguous(x, "x", x.scalar_type(), size);
  check_contiguous(outputs, "outputs", x.scalar_type(), layers * size);
  Tensor sums = torch::stable::empty_like(outputs);
  const PrefixSums args{
      .x = x.data_ptr(),
      .outputs = outputs.data_ptr(),
      .sums = sums.data_ptr(),
      .layers = layers,
      .size = size,
      .dtype = dtype_of(x, "x"),
  };
  if (size == 0) return sums;
#ifdef EASYSPEC_CUDA
  if (x.is_cuda()) {
    on_device_of(x, [&](void* stream) { prefix_sums_cuda(args, stream); });
    return sums;
  }
#endif
  run_phase(prefix_sums_cpu, args, size, layers);
  return sums;
}

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(prefix_sums)
