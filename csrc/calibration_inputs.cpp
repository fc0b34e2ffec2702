#include "calibration_inputs.h"

#include <tuple>

#include "binding.h"

namespace easyspec {

void calibration_inputs_cpu(const CalibrationInputs& args) {
  for (int64_t row = 0; row < args.rows; ++row) do_row(args, row);
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> calibration_inputs(const Tensor& read,
                                                                              const Tensor& query_starts,
                                                                              const Tensor& start_positions,
                                                                              const Tensor& num_valid,
                                                                              const Tensor& sampled,
                                                                              const Tensor& newest,
                                                                              const Tensor& block_table,
                                                                              const Tensor& of_req,
                                                                              const Tensor& offset,
                                                                              const Tensor& known,
                                                                              const Tensor& starts,
                                                                              int64_t block_size,
                                                                              int64_t max_len,
                                                                              int64_t vocab_size,
                                                                              bool write) {
  const int64_t rows = of_req.numel(), reqs = known.numel();
  check_contiguous(read, "read", ScalarType::Int, read.numel());
  check_contiguous(query_starts, "query_starts", ScalarType::Long, reqs);
  check_contiguous(start_positions, "start_positions", ScalarType::Long, reqs);
  check_contiguous(num_valid, "num_valid", ScalarType::Long, reqs);
  check_contiguous(sampled, "sampled", ScalarType::Bool, reqs);
  check_contiguous(newest, "newest", ScalarType::Long, reqs);
  check_block_table(block_table, reqs);
  check_contiguous(of_req, "of_req", ScalarType::Long, rows);
  check_contiguous(offset, "offset", ScalarType::Long, rows);
  check_contiguous(known, "known", ScalarType::Long, reqs);
  check_contiguous(starts, "starts", ScalarType::Int, reqs + 1);
  Tensor input_ids = torch::stable::new_empty(of_req, {rows});
  Tensor positions = torch::stable::new_empty(of_req, {rows});
  Tensor slots = torch::stable::new_empty(of_req, {rows});
  Tensor seq_lens = torch::stable::new_empty(starts, {reqs});
  Tensor newest_rows = torch::stable::new_empty(of_req, {reqs});
  Tensor newest_positions = torch::stable::new_empty(of_req, {reqs});
  const CalibrationInputs args{
      .read = data<int32_t>(read),
      .query_starts = data<int64_t>(query_starts),
      .start_positions = data<int64_t>(start_positions),
      .num_valid = data<int64_t>(num_valid),
      .sampled = data<bool>(sampled),
      .newest = data<int64_t>(newest),
      .table = data<int32_t>(block_table),
      .table_stride = block_table.stride(0),
      .table_width = block_table.size(1),
      .of_req = data<int64_t>(of_req),
      .offset = data<int64_t>(offset),
      .known = data<int64_t>(known),
      .starts = data<int32_t>(starts),
      .input_ids = data<int64_t>(input_ids),
      .positions = data<int64_t>(positions),
      .slots = data<int64_t>(slots),
      .seq_lens = data<int32_t>(seq_lens),
      .newest_rows = data<int64_t>(newest_rows),
      .newest_positions = data<int64_t>(newest_positions),
      .num_read = read.numel(),
      .rows = rows,
      .block_size = block_size,
      .max_len = max_len,
      .vocab_size = vocab_size,
      .write = write,
  };
  const std::tuple outputs(input_ids, positions, slots, seq_lens, newest_rows, newest_positions);
  if (rows == 0) return outputs;
#ifdef EASYSPEC_CUDA
  if (of_req.is_cuda()) {
    on_device_of(of_req, [&](void* stream) { calibration_inputs_cuda(args, stream); });
    return outputs;
  }
#endif
  calibration_inputs_cpu(args);
  return outputs;
}

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(calibration_inputs)
