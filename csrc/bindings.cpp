// The operators' kernels for torch, over its stable ABI: one build serves several torch versions. The schemas, and a
// reference of each operator in plain torch, are in vllm_easyspec/ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "advance_draft_inputs.h"

#ifdef EASYSPEC_CUDA
#include <cuda_runtime.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace easyspec {
namespace {

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than the schema's docstring asks for");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " elements, not ", numel);
}

void check_contiguous(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  check(tensor, name, dtype, numel);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

#ifdef EASYSPEC_CUDA
// The device of `tensor` and its current stream; raises for a kernel that could not be launched.
template <class Launch>
void on_device_of(const Tensor& tensor, Launch launch) {
  const auto index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  launch(stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

void advance_draft_inputs(const Tensor& sampled,
                          const Tensor& positions,
                          const Tensor& live,
                          const Tensor& block_table,
                          const Tensor& input_ids,
                          const Tensor& query_positions,
                          const Tensor& seq_lens,
                          const Tensor& slots,
                          int64_t block_size,
                          int64_t num_blocks,
                          int64_t max_len) {
  const int64_t rows = positions.numel();
  if (rows == 0) return;
  const int64_t layers = slots.numel() / rows;
  check(sampled, "sampled", ScalarType::Long, rows);
  check_contiguous(positions, "positions", ScalarType::Long, rows);
  check_contiguous(live, "live", ScalarType::Bool, rows);
  check_contiguous(input_ids, "input_ids", ScalarType::Long, rows);
  check_contiguous(query_positions, "query_positions", ScalarType::Long, layers * rows);
  check_contiguous(seq_lens, "seq_lens", ScalarType::Int, layers * rows);
  check_contiguous(slots, "slots", ScalarType::Long, layers * rows);
  STD_TORCH_CHECK(block_table.dim() == 2 && block_table.size(0) >= rows && block_table.stride(1) == 1,
                  "block_table is not [rows, width] with contiguous rows");
  check(block_table, "block_table", ScalarType::Int, block_table.size(0) * block_table.size(1));
  const AdvanceDraftInputs args{
      .sampled = static_cast<const int64_t*>(sampled.data_ptr()),
      .sampled_stride = sampled.stride(0),
      .positions = static_cast<int64_t*>(positions.data_ptr()),
      .live = static_cast<const bool*>(live.data_ptr()),
      .table = static_cast<const int32_t*>(block_table.data_ptr()),
      .table_stride = block_table.stride(0),
      .table_width = block_table.size(1),
      .input_ids = static_cast<int64_t*>(input_ids.data_ptr()),
      .query_positions = static_cast<int64_t*>(query_positions.data_ptr()),
      .seq_lens = static_cast<int32_t*>(seq_lens.data_ptr()),
      .slots = static_cast<int64_t*>(slots.data_ptr()),
      .rows = rows,
      .layers = layers,
      .block_size = block_size,
      .num_blocks = num_blocks,
      .max_len = max_len,
  };
#ifdef EASYSPEC_CUDA
  if (positions.is_cuda()) {
    on_device_of(positions, [&](void* stream) { advance_draft_inputs_cuda(args, stream); });
    return;
  }
#endif
  advance_draft_inputs_cpu(args);
}

}  // namespace
}  // namespace easyspec

STABLE_TORCH_LIBRARY_IMPL(vllm_easyspec, CPU, library) {
  library.impl("advance_draft_inputs", TORCH_BOX(&easyspec::advance_draft_inputs));
}

#ifdef EASYSPEC_CUDA
STABLE_TORCH_LIBRARY_IMPL(vllm_easyspec, CUDA, library) {
  library.impl("advance_draft_inputs", TORCH_BOX(&easyspec::advance_draft_inputs));
}
#endif
