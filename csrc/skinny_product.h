// Products of few rows with large matrices on a GPU, with the norm in front of them and what follows in one launch.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace easyspec {

// For each of `layers` layers: [tokens, inner], its RMSNorm if `norms` is given, times [inner, columns], plus `bias`;
// gated: the columns are gates and then as many numbers that they let through, `silu(gate) * number`.
struct SkinnyProduct {
  const void* x;         // `tokens` rows of `inner` numbers
  int64_t layer_step;    // elements from a layer's first row to the next layer's, 0 for one input
  int64_t token_step;    // elements from a row to the next
  const void* norms;     // [layers, inner], or none
  const void* weights;   // [layers, inner, columns]
  const void* bias;      // [layers, columns], or none
  const void* residual;  // [tokens, columns], or none; added to each layer's result, not for gated ones
  void* out;             // rows of `columns` numbers, half as many if gated
  int64_t out_layer_step;
  int64_t out_token_step;
  int64_t outputs;  // layers of `out`; those that are not among `layers` are filled with zeros
  int64_t first;    // the first of `layers` among them
  int64_t step;     // to the next
  int64_t layers;
  int64_t tokens;
  int64_t inner;
  int64_t columns;
  bool gated;
  float eps;
  DType dtype;
};

// In bfloat16, on Hopper and newer; more tokens than this take torch's products.
constexpr int64_t kSkinnyTokens = 16;

// Why the kernel can't do this product; null where it can.
const char* why_not_skinny(const SkinnyProduct& args);
void skinny_product_cuda(const SkinnyProduct& args, void* stream);

}  // namespace easyspec
