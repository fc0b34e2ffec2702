// Head norms, rotary embedding and the paged cache write of a group's queries, keys and values. See
// vllm_easyspec/ops.py.
#pragma once

#include "group_rms_norm.h"

namespace easyspec {

struct RotateAndStore {
  void* qkv;                 // [layers * tokens, heads + 2 * kv_heads, head_dim]
  const int64_t* positions;  // [layers * tokens]
  const void* cos_sin;       // [positions, rotary_dim]: cosines, then sines
  const void* q_norms;       // [layers, head_dim], or none
  const void* k_norms;
  void* cache;           // [pages, kv_heads, page tokens, 2 * head_dim]: a key, then a value; or none
  const int64_t* slots;  // [layers * tokens], where there is a cache
  int64_t page_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t page_tokens;
  int64_t rows;    // layers * tokens
  int64_t tokens;  // of a layer
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t rotary_dim;
  bool neox;  // the halves of a head are the two parts; else neighbours are
  float eps;
  DType dtype;
};

// In place: the norm of one head, then its rotation.
template <class T, class Lanes>
EASYSPEC_BODY void rotate_head(const RotateAndStore& a, T* x, const T* norm, const T* cos_sin, Lanes lanes) {
  const float scale = norm ? inverse_rms(x, a.head_dim, a.eps, lanes) : 1;
  const auto at = [&](int64_t i) {
    return norm ? rounded<T>(rounded<T>(to_float(x[i]) * scale) * to_float(norm[i])) : to_float(x[i]);
  };
  const int64_t half = a.rotary_dim / 2;
  for (int64_t i = lanes.first(); i < half; i += lanes.step()) {
    const int64_t one = a.neox ? i : 2 * i;
    const int64_t two = a.neox ? i + half : 2 * i + 1;
    const float x1 = at(one), x2 = at(two), cos = to_float(cos_sin[i]), sin = to_float(cos_sin[half + i]);
    from_float(x1 * cos - x2 * sin, x[one]);
    from_float(x2 * cos + x1 * sin, x[two]);
  }
  if (norm) {
    for (int64_t i = a.rotary_dim + lanes.first(); i < a.head_dim; i += lanes.step()) from_float(at(i), x[i]);
  }
}

// One head of one row: a query, a key, or (to be stored only) a value.
template <class T, class Lanes>
EASYSPEC_BODY void rotate_and_store_head(const RotateAndStore& a, int64_t row, int64_t head, Lanes lanes) {
  T* x = static_cast<T*>(a.qkv) + (row * (a.heads + 2 * a.kv_heads) + head) * a.head_dim;
  const bool is_query = head < a.heads;
  const bool is_value = head >= a.heads + a.kv_heads;
  if (!is_value) {
    const void* norms = is_query ? a.q_norms : a.k_norms;
    const T* norm = norms ? static_cast<const T*>(norms) + row / a.tokens * a.head_dim : nullptr;
    rotate_head(a, x, norm, static_cast<const T*>(a.cos_sin) + a.positions[row] * a.rotary_dim, lanes);
  }
  if (is_query || !a.cache || a.slots[row] < 0) return;
  const int64_t slot = a.slots[row], kv_head = (head - a.heads) % a.kv_heads;
  T* stored = static_cast<T*>(a.cache) + slot / a.page_tokens * a.page_stride + slot % a.page_tokens * a.token_stride +
              kv_head * a.head_stride + (is_value ? a.head_dim : 0);
  // A lane stores only what it has written itself, so lanes need not wait for one another.
  const int64_t half = is_value ? 0 : a.rotary_dim / 2;
  for (int64_t i = lanes.first(); i < half; i += lanes.step()) {
    const int64_t one = a.neox ? i : 2 * i;
    const int64_t two = a.neox ? i + half : 2 * i + 1;
    stored[one] = x[one];
    stored[two] = x[two];
  }
  for (int64_t i = 2 * half + lanes.first(); i < a.head_dim; i += lanes.step()) stored[i] = x[i];
}

void rotate_and_store_cpu(const RotateAndStore& args, int64_t begin, int64_t end);  // rows
void rotate_and_store_cuda(const RotateAndStore& args, void* stream);

}  // namespace easyspec
