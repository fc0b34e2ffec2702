#include "look_ahead.h"

#include <cstring>

#include "group_rms_norm.h"
#include "product_binding.h"
#include "skinny_matmul.h"

namespace easyspec {
namespace {

// The phases run one after another, the tasks of a phase side by side.

// Tasks: layers x tokens, or tokens.
void features_phase(const LookAhead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t layer = row / a.tokens, token = row % a.tokens;
      float* out = a.features + row * a.inputs;
      const T* known = static_cast<const T*>(a.known) + token * a.known_size;
      for (int64_t i = 0; i < a.known_size; ++i) out[i] = to_float(known[i]);
      if (a.inputs > a.known_size) {
        const T* x = static_cast<const T*>(a.x) + layer * a.layer_step + token * a.hidden;
        const float scale = inverse_rms(x, a.hidden, a.eps, HostLane{});
        for (int64_t i = 0; i < a.hidden; ++i) out[a.known_size + i] = to_float(x[i]) * scale;
      }
    }
  });
}

// Tasks: layers x tiles of the rank.
void thin_phase(const LookAhead& a, int64_t begin, int64_t end) {
  with_type(a.maps_dtype, [&](auto type) {
    using M = decltype(type);
    const int64_t tiles = num_tiles(a.rank);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tiles;
      matmul_tile(a.features + (a.layer_step ? layer * a.tokens * a.inputs : 0),
                  a.inputs,
                  static_cast<const M*>(a.down) + layer * a.inputs * a.rank,
                  static_cast<const M*>(nullptr),
                  static_cast<const M*>(nullptr),
                  a.thin + layer * a.tokens * a.rank,
                  a.tokens,
                  a.inputs,
                  a.rank,
                  task % tiles);
    }
  });
}

// Tasks: layers x tiles of columns.
void up_phase(const LookAhead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_type(a.maps_dtype, [&](auto maps_type) {
      using M = decltype(maps_type);
      const int64_t tiles = num_tiles(a.hidden);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t layer = task / tiles;
        matmul_tile(a.thin + layer * a.tokens * a.rank,
                    a.rank,
                    static_cast<const M*>(a.up) + layer * a.rank * a.hidden,
                    static_cast<const M*>(a.bias) + layer * a.hidden,
                    static_cast<const T*>(a.x) + layer * a.layer_step,
                    static_cast<T*>(a.out) + layer * a.tokens * a.hidden,
                    a.tokens,
                    a.rank,
                    a.hidden,
                    task % tiles);
      }
    });
  });
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

EASYSPEC_REGISTER_ON(CPU, look_ahead)
