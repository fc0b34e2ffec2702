#include "project_among_zeros.h"

#include <cstring>

#include "packed_rows.h"
#include "product_binding.h"

namespace easyspec {
namespace {

// The phases run one after another, the tasks of a phase side by side.

// Tasks: layers x tokens.
void rows_phase(const ProjectAmongZeros& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.inner;
      write_row(a.rows.from(row), a.inner, [&](int64_t i) { return to_float(x[i]); });
    }
  });
}

// Tasks: group x tiles of columns.
void project_phase(const ProjectAmongZeros& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t columns = a.weights.columns;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / a.weights.tiles, tile = task % a.weights.tiles;
      T* out = static_cast<T*>(a.out) + layer * a.tokens * columns;
      const int64_t local = (layer - a.first) / a.step;
      if (layer < a.first || (layer - a.first) % a.step || local >= a.layers) {
        const int64_t size = std::min(kTile, columns - tile * kTile);
        for (int64_t token = 0; token < a.tokens; ++token) {
          std::memset(static_cast<void*>(out + token * columns + tile * kTile), 0, size * sizeof(T));
        }
        continue;
      }
      const Rows rows = a.rows.from(local * a.tokens);
      project_tile(rows, a.weights, local, tile, a.tokens, static_cast<const T*>(a.bias), out);
    }
  });
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
                   .weights = rows_from(weights, first),
                   .bias = rows_from(bias, first),
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

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(project_among_zeros)
