// The inputs of the next draft step, from the drafts of the last one. See vllm_easyspec/ops/.
#pragma once

#include <cstdint>

#include "rows.h"

namespace easyspec {

struct AdvanceDraftInputs {
  const int64_t* sampled;  // [rows], stride sampled_stride
  int64_t sampled_stride;
  int64_t* positions;    // [rows]
  const bool* live;      // [rows]
  const int32_t* table;  // [rows, table_width], stride table_stride
  int64_t table_stride;
  int64_t table_width;
  int64_t* input_ids;        // [rows]
  int64_t* query_positions;  // [layers, rows]
  int32_t* seq_lens;         // [layers, rows]
  int64_t* slots;            // [layers, rows]
  int64_t rows;
  int64_t layers;
  int64_t block_size;
  int64_t num_blocks;
  int64_t max_len;
};

EASYSPEC_BODY void do_row(const AdvanceDraftInputs& a, int64_t row) {
  const bool padding = a.positions[row] < 0;
  const int64_t position = padding ? -1 : a.positions[row] + 1;
  const bool has_room = position < a.max_len;
  int64_t slot = -1;
  if (!padding && a.live[row] && has_room) {
    slot = slot_of(a.table + row * a.table_stride, a.table_width, a.block_size, position);
  }
  a.positions[row] = position;
  a.input_ids[row] = padding ? 0 : a.sampled[row * a.sampled_stride];
  const int64_t query = padding ? 0 : has_room ? position : a.max_len - 1;
  const int64_t seq_len = query + 1;
  for (int64_t layer = 0; layer < a.layers; ++layer) {
    const int64_t at = layer * a.rows + row;
    a.query_positions[at] = query;
    a.seq_lens[at] = static_cast<int32_t>(seq_len);
    a.slots[at] = slot < 0 ? -1 : slot + layer * a.num_blocks * a.block_size;
  }
}

void advance_draft_inputs_cpu(const AdvanceDraftInputs& args);
void advance_draft_inputs_cuda(const AdvanceDraftInputs& args, void* stream);

}  // namespace easyspec
