#include "advance_draft_inputs.h"

#include "binding.h"

namespace easyspec {

void advance_draft_inputs_cpu(const AdvanceDraftInputs& args) {
  for (int64_t row = 0; row < args.rows; ++row) do_row(args, row);
}

namespace {

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
  check_block_table(block_table, rows);
  const AdvanceDraftInputs args{
      .sampled = data<int64_t>(sampled),
      .sampled_stride = sampled.stride(0),
      .positions = data<int64_t>(positions),
      .live = data<bool>(live),
      .table = data<int32_t>(block_table),
      .table_stride = block_table.stride(0),
      .table_width = block_table.size(1),
      .input_ids = data<int64_t>(input_ids),
      .query_positions = data<int64_t>(query_positions),
      .seq_lens = data<int32_t>(seq_lens),
      .slots = data<int64_t>(slots),
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

EASYSPEC_REGISTER(advance_draft_inputs)
