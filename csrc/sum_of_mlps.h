#pragma once

#include "packed_matmul.h"

namespace easyspec {

// The sum of several layers' gated MLPs, each on its own input.
struct SumOfMlps {
  const void* inputs;        // [layers, tokens, hidden]
  const void* norms;         // [layers, hidden]
  PackedMatrices gate_up;    // of the layers, [hidden, 2 * width]: a tile of gates and a tile of what they gate in turn
  const void* gate_up_bias;  // [layers, 2 * width], or none
  PackedMatrices down;       // of the layers, [width, hidden]
  const void* residual;      // [tokens, hidden], or none: added to the sum
  void* out;                 // [tokens, hidden]
  Rows normed;               // [layers * tokens]
  Rows wide;                 // [layers * tokens]
  int64_t layers;
  int64_t tokens;
  int64_t hidden;
  int64_t width;
  float eps;
  DType dtype;
};

}  // namespace easyspec
