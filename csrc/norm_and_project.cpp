#include "norm_and_project.h"

#include "group_rms_norm.h"
#include "packed_rows.h"
#include "product_binding.h"

namespace easyspec {
namespace {

// The phases run one after another, the tasks of a phase side by side.

// Tasks: tokens.
void norm_phase(const NormAndProject& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t token = begin; token < end; ++token) {
      float scale = 0;
      for (int64_t layer = 0; layer < a.layers; ++layer) {
        const T* x = static_cast<const T*>(a.x) + layer * a.layer_step + token * a.hidden;
        if (layer == 0 || a.layer_step) scale = inverse_rms(x, a.hidden, a.eps, HostLane{});
        const T* norm = static_cast<const T*>(a.norms) + layer * a.hidden;
        norm_row(x, norm, scale, a.hidden, a.normed.from(layer * a.tokens + token));
      }
    }
  });
}

// Tasks: layers x tiles of columns.
void project_phase(const NormAndProject& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / a.weights.tiles, first_row = layer * a.tokens;
      project_tile(a.normed.from(first_row),
                   a.weights,
                   layer,
                   task % a.weights.tiles,
                   a.tokens,
                   static_cast<const T*>(a.bias),
                   static_cast<T*>(a.out) + first_row * a.weights.columns);
    }
  });
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
                   .out = out.data_ptr(),
                   .out_layer_step = tokens * columns,
                   .out_token_step = columns,
                   .outputs = layers,
                   .layers = layers,
                   .tokens = tokens,
                   .inner = hidden,
                   .columns = columns,
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

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(norm_and_project)
