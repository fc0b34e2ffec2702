// Head norms, rotary embedding and the paged cache write of a group's queries, keys and values. See
// vllm_easyspec/ops/.
#pragma once

#include "group_rms_norm.h"

namespace easyspec {

struct RotateAndStore {
  void* qkv;                 // [layers * tokens, heads + 2 * kv_heads, head_dim]
  const int64_t* positions;  // [layers * tokens]
  const void* cos_sin;       // [positions, rotary_dim]: cosines, then sines
  const void* q_norms;       // [layers, head_dim], or null
  const void* k_norms;
  void* cache;           // [pages, kv_heads, page tokens, 2 * head_dim]: a key, then a value; or null
  const int64_t* slots;  // [layers * tokens], if there is a cache
  int64_t page_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t page_tokens;
  int64_t rows;    // layers * tokens
  int64_t tokens;  // per layer
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t rotary_dim;
  bool neox;  // pairs are (i, i + half); otherwise (2i, 2i + 1)
  float eps;
  DType dtype;
};

// Calls f(i) for this lane's elements of a head: pairs that are rotated together, in the first `rotary_dim`, and its
// share of the rest. Lanes need not synchronize, since none reads what another has written.
template <class Lanes, class F>
EASYSPEC_BODY void for_own_numbers(const RotateAndStore& a, int64_t rotary_dim, Lanes lanes, F f) {
  const int64_t half = rotary_dim / 2, stride = a.neox ? 1 : 2, apart = a.neox ? half : 1;
  EASYSPEC_INDEPENDENT
  for (int64_t i = lanes.first(); i < half; i += lanes.step()) {
    f(i * stride);
    f(i * stride + apart);
  }
  EASYSPEC_INDEPENDENT
  for (int64_t i = rotary_dim + lanes.first(); i < a.head_dim; i += lanes.step()) f(i);
}

// Rotates one head in place.
template <class T, class Lanes>
EASYSPEC_BODY void rotate_head(const RotateAndStore& a, T* x, const T* cos_sin, Lanes lanes) {
  const int64_t half = a.rotary_dim / 2;
  const int64_t stride = a.neox ? 1 : 2, apart = a.neox ? half : 1;
  EASYSPEC_INDEPENDENT
  for (int64_t i = lanes.first(); i < half; i += lanes.step()) {
    const float x1 = to_float(x[i * stride]), x2 = to_float(x[i * stride + apart]);
    const float cos = to_float(cos_sin[i]), sin = to_float(cos_sin[half + i]);
    from_float(x1 * cos - x2 * sin, x[i * stride]);
    from_float(x2 * cos + x1 * sin, x[i * stride + apart]);
  }
}

// Normalizes one head in place. A lane normalizes the elements that it rotates and stores.
template <class T, class Lanes>
EASYSPEC_BODY void norm_head(const RotateAndStore& a, T* x, const T* norm, Lanes lanes) {
  const float scale = inverse_rms(x, a.head_dim, a.eps, lanes);
  for_own_numbers(a, a.rotary_dim, lanes, [&](int64_t i) {
    from_float(rounded<T>(to_float(x[i]) * scale) * to_float(norm[i]), x[i]);
  });
}

// One head of one row: a query, a key, or (to be stored only) a value.
template <class T, class Lanes>
EASYSPEC_BODY void rotate_and_store_head(const RotateAndStore& a, int64_t row, int64_t head, Lanes lanes) {
  T* x = static_cast<T*>(a.qkv) + (row * (a.heads + 2 * a.kv_heads) + head) * a.head_dim;
  const bool is_query = head < a.heads;
  const bool is_value = head >= a.heads + a.kv_heads;
  if (!is_value) {
    const void* norms = is_query ? a.q_norms : a.k_norms;
    if (norms) norm_head(a, x, static_cast<const T*>(norms) + row / a.tokens * a.head_dim, lanes);
    rotate_head(a, x, static_cast<const T*>(a.cos_sin) + a.positions[row] * a.rotary_dim, lanes);
  }
  if (is_query || !a.cache || a.slots[row] < 0) return;
  const int64_t slot = a.slots[row], kv_head = (head - a.heads) % a.kv_heads;
  T* stored = static_cast<T*>(a.cache) + slot / a.page_tokens * a.page_stride + slot % a.page_tokens * a.token_stride +
              kv_head * a.head_stride + (is_value ? a.head_dim : 0);
  for_own_numbers(a, is_value ? 0 : a.rotary_dim, lanes, [&](int64_t i) { stored[i] = x[i]; });
}

void rotate_and_store_cpu(const RotateAndStore& args, int64_t begin, int64_t end);  // rows
void rotate_and_store_cuda(const RotateAndStore& args, void* stream);

}  // namespace easyspec
