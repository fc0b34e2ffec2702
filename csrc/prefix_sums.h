// The inputs of several layers' MLPs: the group's input plus the attention outputs up to the layer's own. See
// vllm_easyspec/ops/.
#pragma once

#include "lanes.h"

namespace easyspec {

struct PrefixSums {
  const void* x;        // [size]
  const void* outputs;  // [layers, size]
  void* sums;           // [layers, size]
  int64_t layers;
  int64_t size;
  DType dtype;
};

template <class T>
EASYSPEC_BODY void prefix_sums_at(const PrefixSums& a, int64_t i) {
  float sum = to_float(static_cast<const T*>(a.x)[i]);
  for (int64_t at = i; at < a.layers * a.size; at += a.size) {
    sum += to_float(static_cast<const T*>(a.outputs)[at]);
    from_float(sum, static_cast<T*>(a.sums)[at]);
  }
}

void prefix_sums_cpu(const PrefixSums& args, int64_t begin, int64_t end);  // elements
void prefix_sums_cuda(const PrefixSums& args, void* stream);

}  // namespace easyspec
