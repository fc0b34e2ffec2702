// The features that all look-ahead maps of a group read. See vllm_easyspec/ops/.
#pragma once

#include "group_rms_norm.h"

namespace easyspec {

struct GroupFeatures {
  const void* h;         // [tokens, hidden]
  const void* previous;  // [tokens, hidden]
  void* out;             // [tokens, 4 * hidden]
  int64_t tokens;
  int64_t hidden;  // even
  float eps;
  DType dtype;
};

template <class T, class Lanes>
EASYSPEC_BODY void group_features_token(const GroupFeatures& a, int64_t token, Lanes lanes) {
  const T* h = static_cast<const T*>(a.h) + token * a.hidden;
  const T* previous = static_cast<const T*>(a.previous) + token * a.hidden;
  T* u = static_cast<T*>(a.out) + token * 4 * a.hidden;
  T *sizes = u + a.hidden, *pairs = u + 2 * a.hidden, *last = u + 3 * a.hidden;
  const int64_t half = a.hidden / 2;
  const float scale = inverse_rms(h, a.hidden, a.eps, lanes);
  EASYSPEC_INDEPENDENT
  for (int64_t i = lanes.first(); i < half; i += lanes.step()) {
    const float low = rounded<T>(to_float(h[i]) * scale), high = rounded<T>(to_float(h[half + i]) * scale);
    from_float(low, u[i]);
    from_float(high, u[half + i]);
    from_float(fabsf(low), sizes[i]);
    from_float(fabsf(high), sizes[half + i]);
    from_float(fabsf(low + high), pairs[i]);
    from_float(fabsf(low - high), pairs[half + i]);
    last[i] = previous[i];
    last[half + i] = previous[half + i];
  }
}

void group_features_cpu(const GroupFeatures& args, int64_t begin, int64_t end);  // tokens
void group_features_cuda(const GroupFeatures& args, void* stream);

}  // namespace easyspec
