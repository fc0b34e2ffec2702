// Matrix products of few rows on a GPU, in one launch with the norm before them and what follows.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace easyspec {

// For each of `layers` layers: [tokens, inner], its RMSNorm if `norms` is given, times [inner, columns], plus `bias`;
// gated: the columns are gates, then as many values, and the result is `silu(gate) * value`.
struct SkinnyProduct {
  const void* x;                   // `tokens` rows of `inner` numbers
  int64_t layer_step;              // elements between the first rows of two layers, 0 for one input
  int64_t token_step;              // elements between two rows
  const void* norms = nullptr;     // [layers, inner], or null
  const void* weights;             // [layers, inner, columns]
  const void* bias = nullptr;      // [layers, columns], or null
  const void* residual = nullptr;  // [tokens, columns], or null; added to each layer's result; not if gated
  void* out;                       // rows of `columns` numbers, half as many if gated
  int64_t out_layer_step;
  int64_t out_token_step;
  int64_t outputs;    // layers of `out`; those that are not among `layers` are filled with zeros
  int64_t first = 0;  // the first of `layers` among them
  int64_t step = 1;   // to the next
  int64_t layers;
  int64_t tokens;
  int64_t inner;
  int64_t columns;
  bool gated = false;
  float eps = 0;
  DType dtype;
};

// In bfloat16, on Hopper and newer; for more tokens than this torch's products are used.
constexpr int64_t kSkinnyTokens = 16;

// Why the kernel can't compute this product; null if it can.
const char* why_not_skinny(const SkinnyProduct& args);
void skinny_product_cuda(const SkinnyProduct& args, void* stream);

}  // namespace easyspec
