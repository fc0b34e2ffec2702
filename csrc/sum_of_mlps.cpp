#include "sum_of_mlps.h"

#include "group_rms_norm.h"
#include "packed_rows.h"
#include "product_binding.h"

namespace easyspec {
namespace {

// The phases run one after another, the tasks of a phase side by side.

// Tasks: layers x tokens.
void norm_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.inputs) + row * a.hidden;
      const T* norm = static_cast<const T*>(a.norms) + row / a.tokens * a.hidden;
      norm_row(x, norm, inverse_rms(x, a.hidden, a.eps, HostLane{}), a.hidden, a.normed.from(row));
    }
  });
}

// Tasks: layers x tiles of the width.
void gate_up_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float gates[kMostTileRows * kTile], ups[kMostTileRows * kTile];
    const int64_t tiles = a.gate_up.tiles / 2;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tiles, tile = task % tiles, first = tile * kTile;
      const float* scales = a.gate_up.scales ? a.gate_up.scales + layer * 2 * a.width + first : nullptr;
      const T* bias = a.gate_up_bias ? static_cast<const T*>(a.gate_up_bias) + layer * 2 * a.width + first : nullptr;
      // The last tile's columns may be fewer, those of a row that products read have a zero after an odd one.
      const int64_t columns = std::min(kTile, a.width - first), stored = std::min(kTile, a.wide.width - first);
      for (int64_t row = 0; row < a.tokens; row += kMostTileRows) {
        const int64_t count = std::min(kMostTileRows, a.tokens - row);
        const Rows x = a.normed.from(layer * a.tokens + row);
        multiply_tile(x, a.gate_up, layer, 2 * tile, count, gates);
        multiply_tile(x, a.gate_up, layer, 2 * tile + 1, count, ups);
        for (int64_t r = 0; r < count; ++r) {
          const Rows wide = a.wide.from(layer * a.tokens + row + r);
          by_vectors(columns, [&](int64_t column, int64_t n) {
            Vec gate = load(gates + r * kTile + column, n), up = load(ups + r * kTile + column, n);
            if (scales) gate *= load(scales + column, n), up *= load(scales + a.width + column, n);
            if (bias) gate += load(bias + column, n), up += load(bias + a.width + column, n);
            store(gate / (1.0f + exp(-gate)) * up, gates + r * kTile + column, n);
          });
          const auto write = [&](auto* out) {
            by_vectors(stored, [&](int64_t column, int64_t n) {
              store(load(gates + r * kTile + column, n), out + first + column, n);
            });
          };
          if (wide.are_pairs) {
            write(static_cast<BFloat16*>(wide.numbers));
          } else {
            write(static_cast<float*>(wide.numbers));
          }
        }
      }
    }
  });
}

// Tasks: tiles of columns.
void down_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float sums[kMostTileRows * kTile], totals[kMostTileRows * kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile, columns = std::min(kTile, a.hidden - first);
      for (int64_t row = 0; row < a.tokens; row += kMostTileRows) {
        const int64_t count = std::min(kMostTileRows, a.tokens - row);
        for (int64_t layer = 0; layer < a.layers; ++layer) {
          multiply_tile(a.wide.from(layer * a.tokens + row), a.down, layer, tile, count, sums);
          const float* scales = a.down.scales ? a.down.scales + layer * a.hidden + first : nullptr;
          for (int64_t r = 0; r < count; ++r) {
            by_vectors(columns, [&](int64_t column, int64_t n) {
              Vec sum = load(sums + r * kTile + column, n);
              if (scales) sum *= load(scales + column, n);
              if (layer > 0) sum += load(totals + r * kTile + column, n);
              store(sum, totals + r * kTile + column, n);
            });
          }
        }
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = (row + r) * a.hidden + first;
          by_vectors(columns, [&](int64_t column, int64_t n) {
            Vec sum = load(totals + r * kTile + column, n);
            if (a.residual) sum += load(static_cast<const T*>(a.residual) + at + column, n);
            store(sum, static_cast<T*>(a.out) + at + column, n);
          });
        }
      }
    }
  });
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
                   .out = wide.data_ptr(),
                   .out_layer_step = width,
                   .out_token_step = layers * width,
                   .outputs = layers,
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
                   .weights = rows_from(down, first),
                   .residual = rows_from(residual, 0),
                   .out = out.data_ptr(),
                   .out_layer_step = 0,
                   .out_token_step = hidden,
                   .outputs = 1,
                   .layers = 1,
                   .tokens = tokens,
                   .inner = layers * width,
                   .columns = hidden,
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

}  // namespace
}  // namespace easyspec

EASYSPEC_REGISTER(sum_of_mlps)
