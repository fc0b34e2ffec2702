#include "embed_shard.h"

#include <cstring>

#include "binding.h"

namespace easyspec {
namespace {

// The phases run one after another, the tasks of a phase side by side.

// Tasks: tokens.
void embed_shard_phase(const EmbedShard& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    char* out = static_cast<char*>(a.out) + token * a.row_bytes;
    const int64_t row = a.ids[token * a.ids_stride] - a.first;
    if (row >= 0 && row < a.rows) {
      std::memcpy(out, static_cast<const char*>(a.table) + row * a.row_bytes, a.row_bytes);
    } else {
      std::memset(out, 0, a.row_bytes);
    }
  }
}

Tensor embed_shard(const Tensor& ids, const Tensor& table, int64_t first, int64_t rows) {
  check(ids, "ids", ScalarType::Long, ids.size(0));
  STD_TORCH_CHECK(table.dim() == 2 && rows <= table.size(0), "table is not [at least rows, hidden]");
  check_contiguous(table, "table", table.scalar_type(), table.numel());
  Tensor out = torch::stable::new_empty(table, {ids.size(0), table.size(1)});
  const EmbedShard args{
      .ids = data<int64_t>(ids),
      .ids_stride = ids.stride(0),
      .table = table.data_ptr(),
      .out = out.data_ptr(),
      .first = first,
      .rows = rows,
      .row_bytes = table.size(1) * static_cast<int64_t>(table.element_size()),
  };
  run_phase(embed_shard_phase, args, ids.size(0), table.size(1));
  return out;
}

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER_ON(CPU, embed_shard)
