#pragma once

#include "packed_matmul.h"

namespace easyspec {

// The output projections of the layers of a group that live here, among zeros for the others.
struct ProjectAmongZeros {
  const void* x;           // [layers, tokens, inner]
  PackedMatrices weights;  // of the layers, [inner, columns]
  const void* bias;        // [layers, columns], or none
  void* out;               // [group, tokens, columns]
  Rows rows;               // [layers * tokens]
  int64_t layers;
  int64_t group;
  int64_t first;  // the group's first layer here
  int64_t step;   // to the next
  int64_t tokens;
  int64_t inner;
  DType dtype;
};

}  // namespace easyspec
