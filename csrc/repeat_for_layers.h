// The sequences of a pass, repeated for several layers whose pages lie one after another. See vllm_easyspec/ops.py.
#pragma once

#include "lanes.h"

namespace easyspec {

struct RepeatForLayers {
  const int64_t* positions;     // [tokens]
  const int64_t* slots;         // [tokens]
  const int32_t* query_starts;  // [reqs + 1]
  const int32_t* seq_lens;      // [reqs]
  const int32_t* table;         // [reqs, width], stride table_stride
  int64_t table_stride;
  int64_t* all_positions;     // [layers * tokens]
  int64_t* all_slots;         // [layers * tokens]
  int32_t* all_query_starts;  // [layers * reqs + 1]
  int32_t* all_seq_lens;      // [layers * reqs]
  int32_t* all_tables;        // [layers * reqs, width]
  int64_t layers;
  int64_t tokens;
  int64_t reqs;
  int64_t width;
  int64_t num_blocks;
  int64_t block_size;
};

// The i-th element of each result that has so many.
EASYSPEC_BODY void repeat_at(const RepeatForLayers& a, int64_t i) {
  if (i < a.layers * a.tokens) {
    const int64_t layer = i / a.tokens, slot = a.slots[i % a.tokens];
    a.all_positions[i] = a.positions[i % a.tokens];
    a.all_slots[i] = slot < 0 ? -1 : slot + layer * a.num_blocks * a.block_size;
  }
  if (i < a.layers * a.reqs) {
    const int64_t layer = i / a.reqs;
    a.all_query_starts[i] = a.query_starts[i % a.reqs] + static_cast<int32_t>(layer * a.tokens);
    a.all_seq_lens[i] = a.seq_lens[i % a.reqs];
  }
  if (i == a.layers * a.reqs) a.all_query_starts[i] = static_cast<int32_t>(a.layers * a.tokens);
  if (i < a.layers * a.reqs * a.width) {
    const int64_t row = i / a.width, layer = row / a.reqs;
    a.all_tables[i] = a.table[row % a.reqs * a.table_stride + i % a.width] + static_cast<int32_t>(layer * a.num_blocks);
  }
}

inline int64_t num_elements(const RepeatForLayers& a) {
  const int64_t tokens = a.layers * a.tokens, cells = a.layers * a.reqs * a.width, starts = a.layers * a.reqs + 1;
  return tokens > cells ? (tokens > starts ? tokens : starts) : (cells > starts ? cells : starts);
}

void repeat_for_layers_cpu(const RepeatForLayers& args, int64_t begin, int64_t end);  // elements
void repeat_for_layers_cuda(const RepeatForLayers& args, void* stream);

}  // namespace easyspec
