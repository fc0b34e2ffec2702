// The inputs of a calibration pass: tokens, positions, cache slots, lengths. See vllm_easyspec/ops/.
#pragma once

#include <cstdint>

#include "rows.h"

namespace easyspec {

struct CalibrationInputs {
  const int32_t* read;             // [num_read], what the target read
  const int64_t* query_starts;     // [reqs], the request's first token in `read`
  const int64_t* start_positions;  // [reqs], the position of that token
  const int64_t* num_valid;        // [reqs], tokens of the request that are kept
  const bool* sampled;             // [reqs]
  const int64_t* newest;           // [reqs]
  const int32_t* table;            // [reqs, table_width], stride table_stride
  int64_t table_stride;
  int64_t table_width;
  const int64_t* of_req;      // [rows]
  const int64_t* offset;      // [rows], the row's index in its request
  const int64_t* known;       // [reqs], first tokens that are calibrated already, 0 or 1
  const int32_t* starts;      // [reqs + 1], first row of each request
  int64_t* input_ids;         // [rows]
  int64_t* positions;         // [rows]
  int64_t* slots;             // [rows]
  int32_t* seq_lens;          // [reqs]
  int64_t* newest_rows;       // [reqs]
  int64_t* newest_positions;  // [reqs]
  int64_t num_read;
  int64_t rows;
  int64_t block_size;
  int64_t max_len;
  int64_t vocab_size;
  bool write;
};

EASYSPEC_BODY void do_row(const CalibrationInputs& a, int64_t row) {
  const int64_t req = a.of_req[row], offset = a.offset[row], known = a.known[req], valid = a.num_valid[req];
  const int64_t first = a.start_positions[req] + known, tokens = valid - known + a.sampled[req];

  const int64_t source = a.query_starts[req] + offset + known, end = a.num_read - 1;
  const int64_t id = offset + known == valid ? a.newest[req] : a.read[source < end ? source : end];
  const int64_t last_id = a.vocab_size - 1;
  a.input_ids[row] = id < 0 ? 0 : id < last_id ? id : last_id;

  const int64_t position = first + offset;
  const bool has_room = position < a.max_len;
  a.positions[row] = has_room ? position : a.max_len - 1;
  int64_t slot = -1;
  if (a.write && offset < tokens && has_room) {
    slot = slot_of(a.table + req * a.table_stride, a.table_width, a.block_size, position);
  }
  a.slots[row] = slot;

  if (offset > 0) return;
  const int64_t newest_row = a.starts[req] + tokens - 1;
  a.seq_lens[req] = static_cast<int32_t>(first + a.starts[req + 1] - a.starts[req]);
  a.newest_rows[req] = newest_row < 0 ? 0 : newest_row;
  a.newest_positions[req] = first + tokens - 1;
}

void calibration_inputs_cpu(const CalibrationInputs& args);
void calibration_inputs_cuda(const CalibrationInputs& args, void* stream);

}  // namespace easyspec
