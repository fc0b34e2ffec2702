// Matrix products of few rows on the host: bound by reading the matrix, which each block of rows reads once.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace easyspec {

constexpr int64_t kVec = 16;
constexpr int64_t kTile = 64;  // columns per task
constexpr int64_t kRows = 4;   // rows at a time: 4 x 4 sums, in registers

typedef float Vec __attribute__((vector_size(kVec * sizeof(float))));
typedef uint32_t VecBits __attribute__((vector_size(kVec * sizeof(uint32_t))));
typedef uint16_t VecHalfBits __attribute__((vector_size(kVec * sizeof(uint16_t))));

// The first `count` of kVec numbers, followed by zeros.
template <class T>
EASYSPEC_BODY Vec load(const T* from, int64_t count = kVec) {
  T numbers[kVec] = {};
  std::memcpy(static_cast<void*>(numbers), from, count * sizeof(T));
  Vec out;
  for (int64_t i = 0; i < kVec; ++i) out[i] = to_float(numbers[i]);
  return out;
}

template <>
EASYSPEC_BODY Vec load(const float* from, int64_t count) {
  Vec out{};
  std::memcpy(&out, from, count * sizeof(float));
  return out;
}

template <>
EASYSPEC_BODY Vec load(const BFloat16* from, int64_t count) {
  VecHalfBits numbers{};
  std::memcpy(&numbers, from, count * sizeof(BFloat16));
  return std::bit_cast<Vec>(__builtin_convertvector(numbers, VecBits) << 16);
}

template <class T>
EASYSPEC_BODY void store(Vec x, T* to, int64_t count = kVec) {
  T numbers[kVec];
  for (int64_t i = 0; i < kVec; ++i) from_float(x[i], numbers[i]);
  std::memcpy(static_cast<void*>(to), numbers, count * sizeof(T));
}

template <>
EASYSPEC_BODY void store(Vec x, float* to, int64_t count) {
  std::memcpy(to, &x, count * sizeof(float));
}

template <>
EASYSPEC_BODY void store(Vec x, BFloat16* to, int64_t count) {
  const VecBits bits = std::bit_cast<VecBits>(x);
  const VecBits finite = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecHalfBits numbers = __builtin_convertvector(x == x ? finite : VecBits{} + 0x7fc0, VecHalfBits);
  std::memcpy(static_cast<void*>(to), &numbers, count * sizeof(BFloat16));
}

// e^x to about one unit in the last place: 2^n times a polynomial of the remainder, at most ln(2) / 2.
EASYSPEC_BODY Vec exp(Vec x) {
  x = x > 88.0f ? Vec{} + 88.0f : x;
  x = x < -87.0f ? Vec{} - 87.0f : x;
  const Vec to_integer = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = x * 1.44269504f + to_integer;
  const Vec n = shifted - to_integer;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * (1 / 5040.0f) + 1 / 720.0f;
  p = p * r + 1 / 120.0f;
  p = p * r + 1 / 24.0f;
  p = p * r + 1 / 6.0f;
  p = p * r + 0.5f;
  p = (p * r + 1.0f) * r + 1.0f;
  return std::bit_cast<Vec>(std::bit_cast<VecBits>(p) + (std::bit_cast<VecBits>(shifted) << 23));
}

// sums[r][v] = rows [R, inner] times `V` vectors of columns of w [inner, columns].
template <int R, int V, class X, class T>
EASYSPEC_BODY void dot_columns(
    const X* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t inner, int64_t count, Vec (&sums)[R][V]) {
  for (auto& row : sums) {
    for (Vec& sum : row) sum = Vec{};
  }
  for (int64_t i = 0; i < inner; ++i) {
    Vec weights[V];
    for (int v = 0; v < V; ++v) weights[v] = load(w + i * w_stride + v * kVec, count);
    for (int r = 0; r < R; ++r) {
      const float factor = to_float(x[r * x_stride + i]);
      for (int v = 0; v < V; ++v) sums[r][v] += factor * weights[v];
    }
  }
}

// Calls f(rows_type, first_row) for blocks of at most kRows of `rows` rows; rows_type::value is their number.
template <class F>
EASYSPEC_BODY void by_row_blocks(int64_t rows, F f) {
  for (int64_t row = 0; row < rows; row += kRows) {
    switch (std::min(kRows, rows - row)) {
      case 1:
        f(std::integral_constant<int, 1>{}, row);
        break;
      case 2:
        f(std::integral_constant<int, 2>{}, row);
        break;
      case 3:
        f(std::integral_constant<int, 3>{}, row);
        break;
      default:
        f(std::integral_constant<int, 4>{}, row);
    }
  }
}

// Calls f(vectors_type, column, count) for the columns of a task: all of its tile at once, or vector by vector at the
// end, where the last has `count` columns.
template <class F>
EASYSPEC_BODY void by_columns(int64_t first, int64_t columns, F f) {
  if (first + kTile <= columns) return f(std::integral_constant<int, kTile / kVec>{}, first, kVec);
  for (int64_t column = first; column < columns; column += kVec) {
    f(std::integral_constant<int, 1>{}, column, std::min(kVec, columns - column));
  }
}

inline int64_t num_tiles(int64_t columns) { return (columns + kTile - 1) / kTile; }

// One task's columns of `out` = x times w (+ bias) (+ residual).
template <class X, class T, class Residual, class Out>
EASYSPEC_BODY void matmul_tile(const X* x,
                               int64_t x_stride,
                               const T* w,
                               const T* bias,
                               const Residual* residual,
                               Out* out,
                               int64_t rows,
                               int64_t inner,
                               int64_t columns,
                               int64_t tile) {
  by_columns(tile * kTile, columns, [&](auto vectors, int64_t column, int64_t count) {
    by_row_blocks(rows, [&](auto block, int64_t row) {
      constexpr int R = decltype(block)::value, V = decltype(vectors)::value;
      const int64_t n = V > 1 ? kVec : count;  // a constant, but for the last columns
      Vec sums[R][V];
      dot_columns<R, V>(x + row * x_stride, x_stride, w + column, columns, inner, n, sums);
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
          const int64_t at = column + v * kVec;
          Vec sum = sums[r][v];
          if (bias) sum += load(bias + at, n);
          if (residual) sum += load(residual + (row + r) * columns + at, n);
          store(sum, out + (row + r) * columns + at, n);
        }
      }
    });
  });
}

}  // namespace easyspec
