// What the bindings of operators with matrix products share.
#pragma once

#include "binding.h"
#include "packed_matmul.h"
#include "skinny_matmul.h"
#include "skinny_product.h"

namespace easyspec {

// The matrices [inner, columns] of `count` layers from `first` on, of a packed weight [layers, tiles, steps, kTile, 1
// or 2]. parts: how many a layer's columns are packed in, each of whole tiles. scales: [layers, columns], of quantized
// weights.
inline PackedMatrices packed_from(const Tensor& weights,
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
inline Rows rows_for(const PackedMatrices& matrices, DType dtype, float* memory) {
  return {.numbers = memory, .width = row_width(matrices), .are_pairs = multiplies_pairs(dtype, matrices.type)};
}

inline int64_t floats_of(int64_t rows, const PackedMatrices& matrices) { return rows * row_width(matrices); }

#ifdef EASYSPEC_CUDA
// Weights as a GPU's products read them: [layers, inner, columns], in the inputs' dtype.
inline void check_plain(const Tensor& weights,
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
inline void run_skinny(const Tensor& tensor, const SkinnyProduct& args) {
  const char* reason = why_not_skinny(args);
  STD_TORCH_CHECK(reason == nullptr, "the product of few tokens can't be taken: ", reason);
  on_device_of(tensor, [&](void* stream) { skinny_product_cuda(args, stream); });
}
#endif

}  // namespace easyspec
