#pragma once

#include "lanes.h"

namespace easyspec {

// What layers of a group read in place of x: x + [known (, x / rms(x))] times down times up + bias.
struct LookAhead {
  const void* x;       // [tokens, hidden], or [layers, tokens, hidden]
  int64_t layer_step;  // elements from a layer's x to the next one's, 0 for one x
  const void* known;   // [tokens, known_size]
  const void* down;    // [layers, inputs, rank] maps_dtype
  const void* up;      // [layers, rank, hidden] maps_dtype
  const void* bias;    // [layers, hidden] maps_dtype
  void* out;           // [layers, tokens, hidden]
  float* features;     // [layers or 1, tokens, inputs]
  float* thin;         // [layers, tokens, rank]
  int64_t layers;
  int64_t tokens;
  int64_t hidden;
  int64_t known_size;
  int64_t inputs;  // known_size, or hidden more
  int64_t rank;
  float eps;
  DType dtype;
  DType maps_dtype;
};

}  // namespace easyspec
