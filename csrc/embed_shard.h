#pragma once

#include "lanes.h"

namespace easyspec {

// A shard's rows of the embedding table, zeros for the tokens of other shards.
struct EmbedShard {
  const int64_t* ids;  // [tokens], stride ids_stride
  int64_t ids_stride;
  const void* table;  // [rows, row_bytes]
  void* out;          // [tokens, row_bytes]
  int64_t first;      // the shard's first token
  int64_t rows;       // its tokens; the table may have more rows, which pad it
  int64_t row_bytes;
};

}  // namespace easyspec
