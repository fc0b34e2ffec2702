// The operators' kernels for torch, over its stable ABI: one build serves several torch versions. The schemas, and a
// reference of each operator in plain torch, are in vllm_easyspec/ops.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "advance_draft_inputs.h"
#include "calibration_inputs.h"
#include "group_features.h"
#include "group_rms_norm.h"
#include "prefix_sums.h"
#include "rotate_and_store.h"
#include "skinny_product.h"
#include "sublayers_cpu.h"

#ifdef EASYSPEC_CUDA
#include <cuda_runtime.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace easyspec {
namespace {

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " is neither float32 nor bfloat16 nor float16");
  }
}

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than the schema's docstring asks for");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " elements, not ", numel);
}

void check_contiguous(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  check(tensor, name, dtype, numel);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
}

void check_block_table(const Tensor& table, int64_t rows) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) >= rows && table.stride(1) == 1,
                  "block_table is not [rows, width] with contiguous rows");
  check(table, "block_table", ScalarType::Int, table.size(0) * table.size(1));
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Where the rows from `first` on begin.
void* rows_from(const Tensor& tensor, int64_t first) {
  return static_cast<char*>(tensor.data_ptr()) + first * tensor.stride(0) * tensor.element_size();
}

void* rows_from(const std::optional<Tensor>& tensor, int64_t first) {
  return tensor ? rows_from(*tensor, first) : nullptr;
}

// A stacked weight of all layers, of which a call takes `count` from `first` on.
void check_stacked(const std::optional<Tensor>& tensor,
                   const char* name,
                   ScalarType dtype,
                   int64_t first,
                   int64_t count,
                   int64_t numel_of_layer) {
  if (!tensor) return;
  STD_TORCH_CHECK(first >= 0 && first + count <= tensor->size(0), name, " has ", tensor->size(0), " layers");
  check_contiguous(*tensor, name, dtype, tensor->size(0) * numel_of_layer);
}

// Memory for the intermediate results of one call on the host.
float* scratch(int64_t numbers) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < numbers) memory.resize(numbers);
  return memory.data();
}

// Run a phase's tasks, of `work` multiplications each, on torch's threads; few multiplications on this one alone.
template <class Args>
void run_phase(void (*phase)(const Args&, int64_t, int64_t), const Args& args, int64_t tasks, int64_t work) {
  constexpr int64_t kWorkOfAThread = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kWorkOfAThread / std::max<int64_t>(1, work));
  if (tasks <= grain) return phase(args, 0, tasks);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { phase(args, begin, end); });
}

// The matrices [inner, columns] of `count` layers from `first` on, of a packed weight [layers, tiles, steps, kTile, 1
// or 2]. parts: how many a layer's columns are packed in, each of whole tiles. scales: [layers, columns], of quantized
// weights.
PackedMatrices packed_from(const Tensor& weights,
                           const std::optional<Tensor>& scales,
                           const char* name,
                           int64_t first,
                           int64_t count,
                           int64_t inner,
                           int64_t columns,
                           int64_t parts = 1) {
  WeightType type = WeightType::kFloat32;
  switch (weights.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::BFloat16:
      type = WeightType::kBFloat16;
      break;
    case ScalarType::Half:
      type = WeightType::kFloat16;
      break;
    case ScalarType::Char:
      type = WeightType::kInt8;
      break;
    case ScalarType::Float8_e4m3fn:
      type = WeightType::kFloat8;
      break;
    default:
      STD_TORCH_CHECK(false, name, " is of a dtype that no product reads");
  }
  const int64_t abreast = type == WeightType::kFloat32 ? 1 : 2;
  const int64_t tiles = parts * num_tiles(columns / parts), steps = (inner + abreast - 1) / abreast;
  STD_TORCH_CHECK(weights.dim() == 5 && weights.size(1) == tiles && weights.size(2) == steps &&
                      weights.size(3) == kTile && weights.size(4) == abreast,
                  name,
                  " is not packed, or not for these sizes");
  check_stacked(weights, name, weights.scalar_type(), first, count, tiles * steps * kTile * abreast);
  const bool quantized = type == WeightType::kInt8 || type == WeightType::kFloat8;
  STD_TORCH_CHECK(scales.has_value() == quantized, name, " has scales without being quantized, or none");
  check_stacked(scales, "the scales", ScalarType::Float, first, count, columns);
  return {
      .numbers = rows_from(weights, first),
      .scales = static_cast<const float*>(rows_from(scales, first)),
      .tiles = tiles,
      .steps = steps,
      .columns = columns,
      .type = type,
  };
}

// Rows that multiply `matrices`, for which there is memory at `memory`; see floats_of.
Rows rows_for(const PackedMatrices& matrices, DType dtype, float* memory) {
  return {.numbers = memory, .width = row_width(matrices), .are_pairs = multiplies_pairs(dtype, matrices.type)};
}

int64_t floats_of(int64_t rows, const PackedMatrices& matrices) { return rows * row_width(matrices); }

#ifdef EASYSPEC_CUDA
// The device of `tensor` and its current stream; raises for a kernel that could not be launched.
template <class Launch>
void on_device_of(const Tensor& tensor, Launch launch) {
  const auto index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  launch(stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Weights as a GPU's products read them: [layers, inner, columns], in the inputs' dtype.
void check_plain(const Tensor& weights,
                 const std::optional<Tensor>& scales,
                 const char* name,
                 ScalarType dtype,
                 int64_t first,
                 int64_t count,
                 int64_t inner,
                 int64_t columns) {
  STD_TORCH_CHECK(weights.dim() == 3 && weights.size(1) == inner && weights.size(2) == columns && !scales,
                  name,
                  " is not [layers, inner, columns], or is quantized");
  check_stacked(weights, name, dtype, first, count, inner * columns);
}

// A product of few tokens on the device of `tensor`; raises for one that the kernel can't do.
void run_skinny(const Tensor& tensor, const SkinnyProduct& args) {
  const char* reason = why_not_skinny(args);
  STD_TORCH_CHECK(reason == nullptr, "the product of few tokens can't be taken: ", reason);
  on_device_of(tensor, [&](void* stream) { skinny_product_cuda(args, stream); });
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

Tensor group_rms_norm(const Tensor& x, const Tensor& weights, double eps) {
  STD_TORCH_CHECK(weights.dim() == 2 && x.dim() >= 2 && x.dim() <= 3,
                  "x or weights has the wrong number of dimensions");
  const int64_t layers = weights.size(0), tokens = x.size(x.dim() - 2), hidden = weights.size(1);
  const bool shared = x.dim() == 2;
  check_contiguous(x, "x", x.scalar_type(), (shared ? 1 : layers) * tokens * hidden);
  check_contiguous(weights, "weights", x.scalar_type(), layers * hidden);
  Tensor out = torch::stable::new_empty(x, {layers, tokens, hidden});
  const GroupRmsNorm args{
      .x = x.data_ptr(),
      .weights = weights.data_ptr(),
      .out = out.data_ptr(),
      .layers = layers,
      .tokens = tokens,
      .hidden = hidden,
      .shared = shared,
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(x, "x"),
  };
  const int64_t rows = (shared ? 1 : layers) * tokens;
  if (rows == 0) return out;
#ifdef EASYSPEC_CUDA
  if (x.is_cuda()) {
    on_device_of(x, [&](void* stream) { group_rms_norm_cuda(args, stream); });
    return out;
  }
#endif
  run_phase(group_rms_norm_cpu, args, rows, hidden * (shared ? layers : 1));
  return out;
}

Tensor group_features(const Tensor& h, const Tensor& previous, double eps) {
  STD_TORCH_CHECK(h.dim() == 2 && h.size(1) % 2 == 0, "h is not [tokens, hidden] with an even hidden");
  const int64_t tokens = h.size(0), hidden = h.size(1);
  check_contiguous(h, "h", h.scalar_type(), tokens * hidden);
  check_contiguous(previous, "previous", h.scalar_type(), tokens * hidden);
  Tensor out = torch::stable::new_empty(h, {tokens, 4 * hidden});
  const GroupFeatures args{
      .h = h.data_ptr(),
      .previous = previous.data_ptr(),
      .out = out.data_ptr(),
      .tokens = tokens,
      .hidden = hidden,
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(h, "h"),
  };
  if (tokens == 0) return out;
#ifdef EASYSPEC_CUDA
  if (h.is_cuda()) {
    on_device_of(h, [&](void* stream) { group_features_cuda(args, stream); });
    return out;
  }
#endif
  run_phase(group_features_cpu, args, tokens, 4 * hidden);
  return out;
}

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

Tensor norm_and_project(const Tensor& x,
                        const Tensor& norms,
                        const Tensor& weights,
                        const std::optional<Tensor>& scales,
                        const std::optional<Tensor>& bias,
                        int64_t first,
                        int64_t layers,
                        int64_t columns,
                        double eps) {
  const bool one_input = x.dim() == 2;
  STD_TORCH_CHECK(one_input || (x.dim() == 3 && x.size(0) == layers),
                  "x has the wrong number of dimensions or of layers");
  const int64_t tokens = x.size(x.dim() - 2), hidden = x.size(x.dim() - 1);
  const ScalarType dtype = x.scalar_type();
  check_contiguous(x, "x", dtype, (one_input ? 1 : layers) * tokens * hidden);
  check_stacked(norms, "norms", dtype, first, layers, hidden);
  check_stacked(bias, "bias", dtype, first, layers, columns);
  Tensor out = torch::stable::new_empty(x, {layers, tokens, columns});
#ifdef EASYSPEC_CUDA
  if (x.is_cuda()) {
    check_plain(weights, scales, "weights", dtype, first, layers, hidden, columns);
    run_skinny(x,
               {
                   .x = x.data_ptr(),
                   .layer_step = one_input ? 0 : tokens * hidden,
                   .token_step = hidden,
                   .norms = rows_from(norms, first),
                   .weights = rows_from(weights, first),
                   .bias = rows_from(bias, first),
                   .residual = nullptr,
                   .out = out.data_ptr(),
                   .out_layer_step = tokens * columns,
                   .out_token_step = columns,
                   .outputs = layers,
                   .first = 0,
                   .step = 1,
                   .layers = layers,
                   .tokens = tokens,
                   .inner = hidden,
                   .columns = columns,
                   .gated = false,
                   .eps = static_cast<float>(eps),
                   .dtype = dtype_of(x, "x"),
               });
    return out;
  }
#endif
  const PackedMatrices matrices = packed_from(weights, scales, "weights", first, layers, hidden, columns);
  const NormAndProject args{
      .x = x.data_ptr(),
      .layer_step = one_input ? 0 : tokens * hidden,
      .norms = rows_from(norms, first),
      .weights = matrices,
      .bias = rows_from(bias, first),
      .out = out.data_ptr(),
      .normed = rows_for(matrices, dtype_of(x, "x"), scratch(floats_of(layers * tokens, matrices))),
      .layers = layers,
      .tokens = tokens,
      .hidden = hidden,
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(x, "x"),
  };
  run_phase<NormAndProject>(norm_phase, args, tokens, layers * hidden);
  run_phase<NormAndProject>(project_phase, args, layers * matrices.tiles, tokens * hidden * kTile);
  return out;
}

Tensor project_among_zeros(const Tensor& x,
                           const Tensor& weights,
                           const std::optional<Tensor>& scales,
                           const std::optional<Tensor>& bias,
                           int64_t first,
                           int64_t group,
                           int64_t offset,
                           int64_t step,
                           int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 3, "x is not [layers, tokens, inner]");
  const int64_t layers = x.size(0), tokens = x.size(1), inner = x.size(2);
  const ScalarType dtype = x.scalar_type();
  check_contiguous(x, "x", dtype, layers * tokens * inner);
  check_stacked(bias, "bias", dtype, first, layers, columns);
  STD_TORCH_CHECK(offset >= 0 && step >= 1 && offset + (layers - 1) * step < group,
                  "the layers do not fit into the group");
  Tensor out = torch::stable::new_empty(x, {group, tokens, columns});
#ifdef EASYSPEC_CUDA
  if (x.is_cuda()) {
    check_plain(weights, scales, "weights", dtype, first, layers, inner, columns);
    run_skinny(x,
               {
                   .x = x.data_ptr(),
                   .layer_step = tokens * inner,
                   .token_step = inner,
                   .norms = nullptr,
                   .weights = rows_from(weights, first),
                   .bias = rows_from(bias, first),
                   .residual = nullptr,
                   .out = out.data_ptr(),
                   .out_layer_step = tokens * columns,
                   .out_token_step = columns,
                   .outputs = group,
                   .first = offset,
                   .step = step,
                   .layers = layers,
                   .tokens = tokens,
                   .inner = inner,
                   .columns = columns,
                   .gated = false,
                   .eps = 0,
                   .dtype = dtype_of(x, "x"),
               });
    return out;
  }
#endif
  const PackedMatrices matrices = packed_from(weights, scales, "weights", first, layers, inner, columns);
  const ProjectAmongZeros args{
      .x = x.data_ptr(),
      .weights = matrices,
      .bias = rows_from(bias, first),
      .out = out.data_ptr(),
      .rows = rows_for(matrices, dtype_of(x, "x"), scratch(floats_of(layers * tokens, matrices))),
      .layers = layers,
      .group = group,
      .first = offset,
      .step = step,
      .tokens = tokens,
      .inner = inner,
      .dtype = dtype_of(x, "x"),
  };
  run_phase(rows_phase, args, layers * tokens, inner);
  run_phase<ProjectAmongZeros>(project_phase, args, group * matrices.tiles, tokens * inner * kTile);
  return out;
}

Tensor sum_of_mlps(const Tensor& inputs,
                   const Tensor& norms,
                   const Tensor& gate_up,
                   const std::optional<Tensor>& gate_up_scales,
                   const std::optional<Tensor>& gate_up_bias,
                   const Tensor& down,
                   const std::optional<Tensor>& down_scales,
                   const std::optional<Tensor>& residual,
                   int64_t first,
                   int64_t width,
                   double eps) {
  STD_TORCH_CHECK(inputs.dim() == 3, "inputs is not [layers, tokens, hidden]");
  const int64_t layers = inputs.size(0), tokens = inputs.size(1), hidden = inputs.size(2);
  const ScalarType dtype = inputs.scalar_type();
  check_contiguous(inputs, "inputs", dtype, layers * tokens * hidden);
  check_stacked(norms, "norms", dtype, first, layers, hidden);
  check_stacked(gate_up_bias, "gate_up_bias", dtype, first, layers, 2 * width);
  if (residual) check_contiguous(*residual, "residual", dtype, tokens * hidden);
  Tensor out = torch::stable::new_empty(inputs, {tokens, hidden});
#ifdef EASYSPEC_CUDA
  if (inputs.is_cuda()) {
    check_plain(gate_up, gate_up_scales, "gate_up", dtype, first, layers, hidden, 2 * width);
    check_plain(down, down_scales, "down", dtype, first, layers, width, hidden);
    // What the gates let through, the layers side by side, so that the second product sums over them.
    Tensor wide = torch::stable::new_empty(inputs, {tokens, layers * width});
    run_skinny(inputs,
               {
                   .x = inputs.data_ptr(),
                   .layer_step = tokens * hidden,
                   .token_step = hidden,
                   .norms = rows_from(norms, first),
                   .weights = rows_from(gate_up, first),
                   .bias = rows_from(gate_up_bias, first),
                   .residual = nullptr,
                   .out = wide.data_ptr(),
                   .out_layer_step = width,
                   .out_token_step = layers * width,
                   .outputs = layers,
                   .first = 0,
                   .step = 1,
                   .layers = layers,
                   .tokens = tokens,
                   .inner = hidden,
                   .columns = 2 * width,
                   .gated = true,
                   .eps = static_cast<float>(eps),
                   .dtype = dtype_of(inputs, "inputs"),
               });
    run_skinny(inputs,
               {
                   .x = wide.data_ptr(),
                   .layer_step = 0,
                   .token_step = layers * width,
                   .norms = nullptr,
                   .weights = rows_from(down, first),
                   .bias = nullptr,
                   .residual = rows_from(residual, 0),
                   .out = out.data_ptr(),
                   .out_layer_step = 0,
                   .out_token_step = hidden,
                   .outputs = 1,
                   .first = 0,
                   .step = 1,
                   .layers = 1,
                   .tokens = tokens,
                   .inner = layers * width,
                   .columns = hidden,
                   .gated = false,
                   .eps = 0,
                   .dtype = dtype_of(inputs, "inputs"),
               });
    return out;
  }
#endif
  const PackedMatrices wide_in = packed_from(gate_up, gate_up_scales, "gate_up", first, layers, hidden, 2 * width, 2);
  const PackedMatrices wide_out = packed_from(down, down_scales, "down", first, layers, width, hidden);
  const DType type = dtype_of(inputs, "inputs");
  const int64_t rows = layers * tokens;
  float* memory = scratch(floats_of(rows, wide_in) + floats_of(rows, wide_out));
  const SumOfMlps args{
      .inputs = inputs.data_ptr(),
      .norms = rows_from(norms, first),
      .gate_up = wide_in,
      .gate_up_bias = rows_from(gate_up_bias, first),
      .down = wide_out,
      .residual = rows_from(residual, 0),
      .out = out.data_ptr(),
      .normed = rows_for(wide_in, type, memory),
      .wide = rows_for(wide_out, type, memory + floats_of(rows, wide_in)),
      .layers = layers,
      .tokens = tokens,
      .hidden = hidden,
      .width = width,
      .eps = static_cast<float>(eps),
      .dtype = type,
  };
  run_phase<SumOfMlps>(norm_phase, args, rows, hidden);
  run_phase(gate_up_phase, args, layers * wide_in.tiles / 2, tokens * hidden * 2 * kTile);
  run_phase(down_phase, args, wide_out.tiles, tokens * layers * width * kTile);
  return out;
}

Tensor look_ahead(const Tensor& x,
                  const Tensor& known,
                  const Tensor& down,
                  const Tensor& up,
                  const Tensor& bias,
                  int64_t count,
                  bool first,
                  double eps) {
  const bool one_input = x.dim() == 2;
  STD_TORCH_CHECK((one_input || (x.dim() == 3 && x.size(0) == count)) && known.dim() == 2 && down.dim() == 3,
                  "x, known or down has the wrong number of dimensions, or x another number of layers");
  const int64_t tokens = known.size(0), hidden = x.size(x.dim() - 1), inputs = down.size(1), rank = down.size(2);
  const int64_t layers = count - first;
  const ScalarType dtype = x.scalar_type(), maps_dtype = down.scalar_type();
  const int64_t known_size = known.size(1);
  STD_TORCH_CHECK(inputs == known_size + (one_input ? 0 : hidden), "down does not fit the features");
  check_contiguous(x, "x", dtype, (one_input ? 1 : count) * tokens * hidden);
  check_contiguous(known, "known", dtype, tokens * known_size);
  check_stacked(down, "down", maps_dtype, 0, layers, inputs * rank);
  check_stacked(up, "up", maps_dtype, 0, layers, rank * hidden);
  check_stacked(bias, "bias", maps_dtype, 0, layers, hidden);
  Tensor out = torch::stable::new_empty(x, {count, tokens, hidden});
  const int64_t bytes = tokens * hidden * x.element_size(), skipped = first ? bytes : 0;
  if (first) std::memcpy(out.data_ptr(), x.data_ptr(), bytes);
  const int64_t rows = (one_input ? 1 : layers) * tokens;
  float* memory = scratch(rows * inputs + layers * tokens * rank);
  const LookAhead args{
      .x = static_cast<const char*>(x.data_ptr()) + (one_input ? 0 : skipped),
      .layer_step = one_input ? 0 : tokens * hidden,
      .known = known.data_ptr(),
      .down = down.data_ptr(),
      .up = up.data_ptr(),
      .bias = bias.data_ptr(),
      .out = static_cast<char*>(out.data_ptr()) + skipped,
      .features = memory,
      .thin = memory + rows * inputs,
      .layers = layers,
      .tokens = tokens,
      .hidden = hidden,
      .known_size = known_size,
      .inputs = inputs,
      .rank = rank,
      .eps = static_cast<float>(eps),
      .dtype = dtype_of(x, "x"),
      .maps_dtype = dtype_of(down, "down"),
  };
  run_phase(features_phase, args, rows, inputs);
  run_phase(thin_phase, args, layers * num_tiles(rank), tokens * inputs * kTile);
  run_phase(up_phase, args, layers * num_tiles(hidden), tokens * rank * kTile);
  return out;
}

}  // namespace
}  // namespace easyspec

STABLE_TORCH_LIBRARY_IMPL(vllm_easyspec, CPU, library) {
  library.impl("advance_draft_inputs", TORCH_BOX(&easyspec::advance_draft_inputs));
  library.impl("calibration_inputs", TORCH_BOX(&easyspec::calibration_inputs));
  library.impl("group_features", TORCH_BOX(&easyspec::group_features));
  library.impl("group_rms_norm", TORCH_BOX(&easyspec::group_rms_norm));
  library.impl("prefix_sums", TORCH_BOX(&easyspec::prefix_sums));
  library.impl("rotate_and_store", TORCH_BOX(&easyspec::rotate_and_store));
  library.impl("embed_shard", TORCH_BOX(&easyspec::embed_shard));
  library.impl("norm_and_project", TORCH_BOX(&easyspec::norm_and_project));
  library.impl("project_among_zeros", TORCH_BOX(&easyspec::project_among_zeros));
  library.impl("sum_of_mlps", TORCH_BOX(&easyspec::sum_of_mlps));
  library.impl("look_ahead", TORCH_BOX(&easyspec::look_ahead));
}

#ifdef EASYSPEC_CUDA
STABLE_TORCH_LIBRARY_IMPL(vllm_easyspec, CUDA, library) {
  library.impl("advance_draft_inputs", TORCH_BOX(&easyspec::advance_draft_inputs));
  library.impl("calibration_inputs", TORCH_BOX(&easyspec::calibration_inputs));
  library.impl("group_features", TORCH_BOX(&easyspec::group_features));
  library.impl("group_rms_norm", TORCH_BOX(&easyspec::group_rms_norm));
  library.impl("prefix_sums", TORCH_BOX(&easyspec::prefix_sums));
  library.impl("rotate_and_store", TORCH_BOX(&easyspec::rotate_and_store));
  library.impl("norm_and_project", TORCH_BOX(&easyspec::norm_and_project));
  library.impl("project_among_zeros", TORCH_BOX(&easyspec::project_among_zeros));
  library.impl("sum_of_mlps", TORCH_BOX(&easyspec::sum_of_mlps));
}
#endif
