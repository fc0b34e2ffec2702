// Rows that multiply packed matrices: written, and multiplied tile by tile.
#pragma once

#include "packed_matmul.h"
#include "skinny_matmul.h"

namespace easyspec {

// Calls f(numbers, index) -> float for each of a row's `count` numbers, and stores it as the products read it.
template <class F>
EASYSPEC_BODY void write_row(const Rows& row, int64_t count, F number) {
  const auto write = [&](auto* out) {
    for (int64_t i = 0; i < count; ++i) from_float(number(i), out[i]);
    for (int64_t i = count; i < row.width; ++i) from_float(0.0f, out[i]);
  };
  return row.are_pairs ? write(static_cast<BFloat16*>(row.numbers)) : write(static_cast<float*>(row.numbers));
}

template <class T>
void norm_row(const T* x, const T* norm, float scale, int64_t hidden, const Rows& out) {
  write_row(out, hidden, [&](int64_t i) { return to_float(x[i]) * scale * to_float(norm[i]); });
}

// Calls f(column, n) for vectors of a tile's columns, the last of n columns.
template <class F>
EASYSPEC_BODY void by_vectors(int64_t columns, F f) {
  const int64_t whole = columns / kVec * kVec;
  for (int64_t column = 0; column < whole; column += kVec) f(column, kVec);
  if (whole < columns) f(whole, columns - whole);
}

// A layer's tile of `out` = x times w (+ bias).
template <class T>
void project_tile(
    const Rows& x, const PackedMatrices& w, int64_t layer, int64_t tile, int64_t rows, const T* bias, T* out) {
  const int64_t first = tile * kTile, columns = std::min(kTile, w.columns - first);
  const float* scales = w.scales ? w.scales + layer * w.columns + first : nullptr;
  alignas(64) float sums[kMostTileRows * kTile];
  for (int64_t row = 0; row < rows; row += kMostTileRows) {
    const int64_t count = std::min(kMostTileRows, rows - row);
    multiply_tile(x.from(row), w, layer, tile, count, sums);
    for (int64_t r = 0; r < count; ++r) {
      by_vectors(columns, [&](int64_t column, int64_t n) {
        Vec sum = load(sums + r * kTile + column, n);
        if (scales) sum *= load(scales + column, n);
        if (bias) sum += load(bias + layer * w.columns + first + column, n);
        store(sum, out + (row + r) * w.columns + first + column, n);
      });
    }
  }
}

}  // namespace easyspec
