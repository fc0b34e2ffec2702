#include "sublayers_cpu.h"

namespace easyspec {

void embed_shard_phase(const EmbedShard& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    char* out = static_cast<char*>(a.out) + token * a.row_bytes;
    const int64_t row = a.ids[token * a.ids_stride] - a.first;
    if (row >= 0 && row < a.rows) {
      std::memcpy(out, static_cast<const char*>(a.table) + row * a.row_bytes, a.row_bytes);
    } else {
      std::memset(out, 0, a.row_bytes);
    }
  }
}

void norm_phase(const NormAndProject& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t token = begin; token < end; ++token) {
      float scale = 0;
      for (int64_t layer = 0; layer < a.layers; ++layer) {
        const T* x = static_cast<const T*>(a.x) + layer * a.layer_step + token * a.hidden;
        if (layer == 0 || a.layer_step) scale = inverse_rms(x, a.hidden, a.eps, HostLane{});
        const T* norm = static_cast<const T*>(a.norms) + layer * a.hidden;
        float* out = a.normed + (layer * a.tokens + token) * a.hidden;
        for (int64_t i = 0; i < a.hidden; ++i) out[i] = to_float(x[i]) * scale * to_float(norm[i]);
      }
    }
  });
}

void project_phase(const NormAndProject& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t tiles = num_tiles(a.columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tiles;
      const T* bias = a.bias ? static_cast<const T*>(a.bias) + layer * a.columns : nullptr;
      matmul_tile(a.normed + layer * a.tokens * a.hidden,
                  a.hidden,
                  static_cast<const T*>(a.weights) + layer * a.hidden * a.columns,
                  bias,
                  static_cast<const T*>(nullptr),
                  static_cast<T*>(a.out) + layer * a.tokens * a.columns,
                  a.tokens,
                  a.hidden,
                  a.columns,
                  task % tiles);
    }
  });
}

void project_among_zeros_phase(const ProjectAmongZeros& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t tiles = num_tiles(a.columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tiles, tile = task % tiles;
      T* out = static_cast<T*>(a.out) + layer * a.tokens * a.columns;
      const int64_t local = (layer - a.first) / a.step;
      if (layer < a.first || (layer - a.first) % a.step || local >= a.layers) {
        const int64_t size = std::min(kTile, a.columns - tile * kTile);
        for (int64_t token = 0; token < a.tokens; ++token) {
          std::memset(static_cast<void*>(out + token * a.columns + tile * kTile), 0, size * sizeof(T));
        }
        continue;
      }
      const T* bias = a.bias ? static_cast<const T*>(a.bias) + local * a.columns : nullptr;
      matmul_tile(static_cast<const T*>(a.x) + local * a.tokens * a.inner,
                  a.inner,
                  static_cast<const T*>(a.weights) + local * a.inner * a.columns,
                  bias,
                  static_cast<const T*>(nullptr),
                  out,
                  a.tokens,
                  a.inner,
                  a.columns,
                  tile);
    }
  });
}

void norm_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.inputs) + row * a.hidden;
      const T* norm = static_cast<const T*>(a.norms) + row / a.tokens * a.hidden;
      float* out = a.normed + row * a.hidden;
      const float scale = inverse_rms(x, a.hidden, a.eps, HostLane{});
      for (int64_t i = 0; i < a.hidden; ++i) out[i] = to_float(x[i]) * scale * to_float(norm[i]);
    }
  });
}

void gate_up_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    // Half a tile each of the gates and of what they gate.
    constexpr int kHalf = kTile / kVec / 2;
    const int64_t tiles = num_tiles(2 * a.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tiles, first = task % tiles * (kTile / 2);
      const float* x = a.normed + layer * a.tokens * a.hidden;
      const T* w = static_cast<const T*>(a.gate_up) + layer * a.hidden * 2 * a.width;
      const T* bias = a.gate_up_bias ? static_cast<const T*>(a.gate_up_bias) + layer * 2 * a.width : nullptr;
      float* wide = a.wide + layer * a.width;
      const auto gated = [&](auto vectors, int64_t column, int64_t count) {
        by_row_blocks(a.tokens, [&](auto block, int64_t row) {
          constexpr int R = decltype(block)::value, V = decltype(vectors)::value;
          const int64_t n = V > 1 ? kVec : count;  // a constant, but for the last columns
          Vec gates[R][V], ups[R][V];
          const float* rows = x + row * a.hidden;
          dot_columns<R, V>(rows, a.hidden, w + column, 2 * a.width, a.hidden, n, gates);
          dot_columns<R, V>(rows, a.hidden, w + a.width + column, 2 * a.width, a.hidden, n, ups);
          for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
              const int64_t at = column + v * kVec;
              Vec gate = gates[r][v], up = ups[r][v];
              if (bias) gate += load(bias + at, n), up += load(bias + a.width + at, n);
              store(gate / (1.0f + exp(-gate)) * up, wide + (row + r) * a.layers * a.width + at, n);
            }
          }
        });
      };
      if (first + kTile / 2 <= a.width) {
        gated(std::integral_constant<int, kHalf>{}, first, kVec);
      } else {
        for (int64_t column = first; column < a.width; column += kVec) {
          gated(std::integral_constant<int, 1>{}, column, std::min(kVec, a.width - column));
        }
      }
    }
  });
}

void down_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t inner = a.layers * a.width;
    for (int64_t tile = begin; tile < end; ++tile) {
      matmul_tile(a.wide,
                  inner,
                  static_cast<const T*>(a.down),
                  static_cast<const T*>(nullptr),
                  static_cast<const T*>(a.residual),
                  static_cast<T*>(a.out),
                  a.tokens,
                  inner,
                  a.hidden,
                  tile);
    }
  });
}

void features_phase(const LookAhead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t layer = row / a.tokens, token = row % a.tokens;
      float* out = a.features + row * a.inputs;
      const T* known = static_cast<const T*>(a.known) + token * a.known_size;
      for (int64_t i = 0; i < a.known_size; ++i) out[i] = to_float(known[i]);
      if (a.inputs > a.known_size) {
        const T* x = static_cast<const T*>(a.x) + layer * a.layer_step + token * a.hidden;
        const float scale = inverse_rms(x, a.hidden, a.eps, HostLane{});
        for (int64_t i = 0; i < a.hidden; ++i) out[a.known_size + i] = to_float(x[i]) * scale;
      }
    }
  });
}

void thin_phase(const LookAhead& a, int64_t begin, int64_t end) {
  with_type(a.maps_dtype, [&](auto type) {
    using M = decltype(type);
    const int64_t tiles = num_tiles(a.rank);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tiles;
      matmul_tile(a.features + (a.layer_step ? layer * a.tokens * a.inputs : 0),
                  a.inputs,
                  static_cast<const M*>(a.down) + layer * a.inputs * a.rank,
                  static_cast<const M*>(nullptr),
                  static_cast<const M*>(nullptr),
                  a.thin + layer * a.tokens * a.rank,
                  a.tokens,
                  a.inputs,
                  a.rank,
                  task % tiles);
    }
  });
}

void up_phase(const LookAhead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_type(a.maps_dtype, [&](auto maps_type) {
      using M = decltype(maps_type);
      const int64_t tiles = num_tiles(a.hidden);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t layer = task / tiles;
        matmul_tile(a.thin + layer * a.tokens * a.rank,
                    a.rank,
                    static_cast<const M*>(a.up) + layer * a.rank * a.hidden,
                    static_cast<const M*>(a.bias) + layer * a.hidden,
                    static_cast<const T*>(a.x) + layer * a.layer_step,
                    static_cast<T*>(a.out) + layer * a.tokens * a.hidden,
                    a.tokens,
                    a.rank,
                    a.hidden,
                    task % tiles);
      }
    });
  });
}

}  // namespace easyspec
