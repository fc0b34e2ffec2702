#include "rotate_and_store.h"

#include "binding.h"

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

namespace {

void rotate_and_store(const Tensor& qkv,
                      const Tensor& positions,
                      const Tensor& cos_sin,
                      int64_t num_heads,
                      int64_t num_kv_heads,
                      bool neox,
                      const std::optional<Tensor>& q_norms,
                      const std::optional<Tensor>& k_norms,
                      int64_t first,
                      double eps,
                      const std::optional<Tensor>& cache,
                      const std::optional<Tensor>& slots) {
  STD_TORCH_CHECK(qkv.dim() == 4, "qkv is not [layers, tokens, heads, head_dim]");
  const int64_t layers = qkv.size(0), rows = layers * qkv.size(1), head_dim = qkv.size(3);
  const ScalarType dtype = qkv.scalar_type();
  if (rows == 0) return;
  check_contiguous(qkv, "qkv", dtype, rows * (num_heads + 2 * num_kv_heads) * head_dim);
  check_contiguous(positions, "positions", ScalarType::Long, rows);
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.size(1) <= head_dim, "cos_sin is not [positions, rotary_dim]");
  check_contiguous(cos_sin, "cos_sin", dtype, cos_sin.numel());
  check_stacked(q_norms, "q_norms", dtype, first, layers, head_dim);
  check_stacked(k_norms, "k_norms", dtype, first, layers, head_dim);
  RotateAndStore args{
      .qkv = qkv.data_ptr(),
      .positions = data<int64_t>(positions),
      .cos_sin = cos_sin.data_ptr(),
      .q_norms = rows_from(q_norms, first),
      .k_norms = rows_from(k_norms, first),
      .cache = nullptr,
      .slots = nullptr,
      .page_stride = 0,
      .head_stride = 0,
      .token_stride = 0,
      .page_tokens = 1,
      .rows = rows,
      .tokens = qkv.size(1),
      .heads = num_heads,
      .kv_heads = num_kv_heads,
      .head_dim = head_dim,
      .rotary_dim = cos_sin.size(1),
      .neox = neox,
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(qkv, "qkv"),
  };
  if (cache) {
    STD_TORCH_CHECK(cache->dim() == 4 && cache->size(1) == num_kv_heads && cache->size(3) == 2 * head_dim &&
                        cache->stride(3) == 1 && cache->scalar_type() == dtype,
                    "cache is not [pages, kv_heads, page tokens, 2 * head_dim] of qkv's dtype");
    STD_TORCH_CHECK(slots.has_value(), "a cache needs slots");
    check_contiguous(*slots, "slots", ScalarType::Long, rows);
    args.cache = cache->data_ptr();
    args.slots = data<int64_t>(*slots);
    args.page_stride = cache->stride(0);
    args.head_stride = cache->stride(1);
    args.token_stride = cache->stride(2);
    args.page_tokens = cache->size(2);
  }
#ifdef EASYSPEC_CUDA
  if (qkv.is_cuda()) {
    on_device_of(qkv, [&](void* stream) { rotate_and_store_cuda(args, stream); });
    return;
  }
#endif
  run_phase(rotate_and_store_cpu, args, rows, 4 * (num_heads + num_kv_heads) * head_dim);
}

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(rotate_and_store)
