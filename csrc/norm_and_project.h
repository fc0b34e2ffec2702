#pragma once

#include "packed_matmul.h"

namespace easyspec {

// Norm and projection of a group's queries, keys and values, from one input or one a layer.
struct NormAndProject {
  const void* x;           // [tokens, hidden], or [layers, tokens, hidden]
  int64_t layer_step;      // elements from a layer's input to the next one's, 0 for one input
  const void* norms;       // [layers, hidden]
  PackedMatrices weights;  // of the layers, [hidden, columns]
  const void* bias;        // [layers, columns], or none
  void* out;               // [layers, tokens, columns]
  Rows normed;             // [layers * tokens]
  int64_t layers;
  int64_t tokens;
  int64_t hidden;
  float eps;
  DType dtype;
};

}  // namespace easyspec
