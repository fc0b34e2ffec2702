// Products of rows with large matrices, on the host. With few rows they are bound by reading the matrix, so it lies in
// memory in the order in which it is read: tile by tile of kTile columns, all of a tile's numbers one after another
// (vllm_easyspec/packing.py).
#pragma once

#include <cstdint>

#include "lanes.h"

namespace easyspec {

enum class WeightType { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8 };

// Matrices of several layers. Numbers of 16 and of 8 bits lie in pairs of neighbouring inner indices, an odd number of
// them with a zero after it.
struct PackedMatrices {
  const void* numbers;  // [layers, tiles, steps, kTile, 2], or [layers, tiles, steps, kTile, 1] of float32
  const float* scales;  // [layers, columns], by which the sums are multiplied, or none
  int64_t tiles;
  int64_t steps;
  int64_t columns;
  WeightType type;
};

// Rows to be multiplied, as the products read them: float32, or pairs of bfloat16 where the processor has a dot product
// of them and the drafter computes in bfloat16.
struct Rows {
  void* numbers;  // [rows, width]
  int64_t width;  // numbers of a row, a zero in place of an odd one's neighbour
  bool are_pairs;

  int64_t bytes() const { return width * (are_pairs ? sizeof(BFloat16) : sizeof(float)); }
  Rows from(int64_t row) const { return {static_cast<char*>(numbers) + row * bytes(), width, are_pairs}; }
};

// Numbers of a row that multiplies these matrices.
inline int64_t row_width(const PackedMatrices& matrices) {
  return matrices.steps * (matrices.type == WeightType::kFloat32 ? 1 : 2);
}

// Whether rows of `dtype` are to be pairs for these matrices.
bool multiplies_pairs(DType dtype, WeightType type);

constexpr int64_t kMostTileRows = 64;

// sums [rows, kTile] = at most kMostTileRows rows times a layer's tile, not yet scaled.
void multiply_tile(
    const Rows& x, const PackedMatrices& matrices, int64_t layer, int64_t tile, int64_t rows, float* sums);

}  // namespace easyspec
