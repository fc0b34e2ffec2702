// RMSNorm of one input, or one per layer, with the weights of several layers. See vllm_easyspec/ops/.
#pragma once

#include <cmath>

#include "lanes.h"

namespace easyspec {

struct GroupRmsNorm {
  const void* x;        // [tokens, hidden], or [layers, tokens, hidden]
  const void* weights;  // [layers, hidden]
  void* out;            // [layers, tokens, hidden]
  int64_t layers;
  int64_t tokens;
  int64_t hidden;
  bool shared;  // one input for all layers
  float eps;
  DType dtype;
};

// The factor that makes `x` a vector of root mean square 1.
template <class T, class Lanes>
EASYSPEC_BODY float inverse_rms(const T* x, int64_t hidden, float eps, Lanes lanes) {
  float sum = 0;
  EASYSPEC_SUM_IN_ANY_ORDER(sum)
  for (int64_t i = lanes.first(); i < hidden; i += lanes.step()) sum += to_float(x[i]) * to_float(x[i]);
  return 1 / sqrtf(lanes.sum(sum) / static_cast<float>(hidden) + eps);
}

// One token of the layers from `first` to `last`, which read the same input: all layers if it is shared, else one.
template <class T, class Lanes>
EASYSPEC_BODY void group_rms_norm_token(
    const GroupRmsNorm& a, int64_t token, int64_t first, int64_t last, Lanes lanes) {
  const T* x = static_cast<const T*>(a.x) + ((a.shared ? 0 : first * a.tokens) + token) * a.hidden;
  const float scale = inverse_rms(x, a.hidden, a.eps, lanes);
  for (int64_t layer = first; layer < last; ++layer) {
    const T* weights = static_cast<const T*>(a.weights) + layer * a.hidden;
    T* out = static_cast<T*>(a.out) + (layer * a.tokens + token) * a.hidden;
    // Rounded between the two factors, like the models' own norms.
    for (int64_t i = lanes.first(); i < a.hidden; i += lanes.step()) {
      from_float(rounded<T>(to_float(x[i]) * scale) * to_float(weights[i]), out[i]);
    }
  }
}

void group_rms_norm_cpu(const GroupRmsNorm& args, int64_t begin, int64_t end);  // tokens, of each layer if not shared
void group_rms_norm_cuda(const GroupRmsNorm& args, void* stream);

}  // namespace easyspec
