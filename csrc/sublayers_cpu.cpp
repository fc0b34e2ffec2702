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

namespace {

// Calls f(numbers, index) -> float for each of a row's `count` numbers, and stores it as the products read it.
template <class F>
EASYSPEC_BODY void write_row(const Rows& row, int64_t count, F number) {
  const auto write = [&](auto* out) {
    for (int64_t i = 0; i < count; ++i) from_float(number(i), out[i]);
    for (int64_t i = count; i < row.width; ++i) from_float(0.0f, out[i]);
  };
  return row.are_pairs ? write(static_cast<BFloat16*>(row.numbers)) : write(static_cast<float*>(row.numbers));
}

template <class T>
void norm_row(const T* x, const T* norm, float scale, int64_t hidden, const Rows& out) {
  write_row(out, hidden, [&](int64_t i) { return to_float(x[i]) * scale * to_float(norm[i]); });
}

// Calls f(column, n) for vectors of a tile's columns, the last of n columns.
template <class F>
EASYSPEC_BODY void by_vectors(int64_t columns, F f) {
  const int64_t whole = columns / kVec * kVec;
  for (int64_t column = 0; column < whole; column += kVec) f(column, kVec);
  if (whole < columns) f(whole, columns - whole);
}

// A layer's tile of `out` = x times w (+ bias).
template <class T>
void project_tile(
    const Rows& x, const PackedMatrices& w, int64_t layer, int64_t tile, int64_t rows, const T* bias, T* out) {
  const int64_t first = tile * kTile, columns = std::min(kTile, w.columns - first);
  const float* scales = w.scales ? w.scales + layer * w.columns + first : nullptr;
  alignas(64) float sums[kMostTileRows * kTile];
  for (int64_t row = 0; row < rows; row += kMostTileRows) {
    const int64_t count = std::min(kMostTileRows, rows - row);
    multiply_tile(x.from(row), w, layer, tile, count, sums);
    for (int64_t r = 0; r < count; ++r) {
      by_vectors(columns, [&](int64_t column, int64_t n) {
        Vec sum = load(sums + r * kTile + column, n);
        if (scales) sum *= load(scales + column, n);
        if (bias) sum += load(bias + layer * w.columns + first + column, n);
        store(sum, out + (row + r) * w.columns + first + column, n);
      });
    }
  }
}

}  // namespace

void norm_phase(const NormAndProject& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t token = begin; token < end; ++token) {
      float scale = 0;
      for (int64_t layer = 0; layer < a.layers; ++layer) {
        const T* x = static_cast<const T*>(a.x) + layer * a.layer_step + token * a.hidden;
        if (layer == 0 || a.layer_step) scale = inverse_rms(x, a.hidden, a.eps, HostLane{});
        const T* norm = static_cast<const T*>(a.norms) + layer * a.hidden;
        norm_row(x, norm, scale, a.hidden, a.normed.from(layer * a.tokens + token));
      }
    }
  });
}

void project_phase(const NormAndProject& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / a.weights.tiles, first_row = layer * a.tokens;
      project_tile(a.normed.from(first_row),
                   a.weights,
                   layer,
                   task % a.weights.tiles,
                   a.tokens,
                   static_cast<const T*>(a.bias),
                   static_cast<T*>(a.out) + first_row * a.weights.columns);
    }
  });
}

void rows_phase(const ProjectAmongZeros& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.inner;
      write_row(a.rows.from(row), a.inner, [&](int64_t i) { return to_float(x[i]); });
    }
  });
}

void project_phase(const ProjectAmongZeros& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t columns = a.weights.columns;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / a.weights.tiles, tile = task % a.weights.tiles;
      T* out = static_cast<T*>(a.out) + layer * a.tokens * columns;
      const int64_t local = (layer - a.first) / a.step;
      if (layer < a.first || (layer - a.first) % a.step || local >= a.layers) {
        const int64_t size = std::min(kTile, columns - tile * kTile);
        for (int64_t token = 0; token < a.tokens; ++token) {
          std::memset(static_cast<void*>(out + token * columns + tile * kTile), 0, size * sizeof(T));
        }
        continue;
      }
      const Rows rows = a.rows.from(local * a.tokens);
      project_tile(rows, a.weights, local, tile, a.tokens, static_cast<const T*>(a.bias), out);
    }
  });
}

void norm_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.inputs) + row * a.hidden;
      const T* norm = static_cast<const T*>(a.norms) + row / a.tokens * a.hidden;
      norm_row(x, norm, inverse_rms(x, a.hidden, a.eps, HostLane{}), a.hidden, a.normed.from(row));
    }
  });
}

void gate_up_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float gates[kMostTileRows * kTile], ups[kMostTileRows * kTile];
    const int64_t tiles = a.gate_up.tiles / 2;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tiles, tile = task % tiles, first = tile * kTile;
      const float* scales = a.gate_up.scales ? a.gate_up.scales + layer * 2 * a.width + first : nullptr;
      const T* bias = a.gate_up_bias ? static_cast<const T*>(a.gate_up_bias) + layer * 2 * a.width + first : nullptr;
      // The last tile's columns may be fewer, those of a row that products read have a zero after an odd one.
      const int64_t columns = std::min(kTile, a.width - first), stored = std::min(kTile, a.wide.width - first);
      for (int64_t row = 0; row < a.tokens; row += kMostTileRows) {
        const int64_t count = std::min(kMostTileRows, a.tokens - row);
        const Rows x = a.normed.from(layer * a.tokens + row);
        multiply_tile(x, a.gate_up, layer, 2 * tile, count, gates);
        multiply_tile(x, a.gate_up, layer, 2 * tile + 1, count, ups);
        for (int64_t r = 0; r < count; ++r) {
          const Rows wide = a.wide.from(layer * a.tokens + row + r);
          by_vectors(columns, [&](int64_t column, int64_t n) {
            Vec gate = load(gates + r * kTile + column, n), up = load(ups + r * kTile + column, n);
            if (scales) gate *= load(scales + column, n), up *= load(scales + a.width + column, n);
            if (bias) gate += load(bias + column, n), up += load(bias + a.width + column, n);
            store(gate / (1.0f + exp(-gate)) * up, gates + r * kTile + column, n);
          });
          const auto write = [&](auto* out) {
            by_vectors(stored, [&](int64_t column, int64_t n) {
              store(load(gates + r * kTile + column, n), out + first + column, n);
            });
          };
          if (wide.are_pairs) {
            write(static_cast<BFloat16*>(wide.numbers));
          } else {
            write(static_cast<float*>(wide.numbers));
          }
        }
      }
    }
  });
}

void down_phase(const SumOfMlps& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) float sums[kMostTileRows * kTile], totals[kMostTileRows * kTile];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTile, columns = std::min(kTile, a.hidden - first);
      for (int64_t row = 0; row < a.tokens; row += kMostTileRows) {
        const int64_t count = std::min(kMostTileRows, a.tokens - row);
        for (int64_t layer = 0; layer < a.layers; ++layer) {
          multiply_tile(a.wide.from(layer * a.tokens + row), a.down, layer, tile, count, sums);
          const float* scales = a.down.scales ? a.down.scales + layer * a.hidden + first : nullptr;
          for (int64_t r = 0; r < count; ++r) {
            by_vectors(columns, [&](int64_t column, int64_t n) {
              Vec sum = load(sums + r * kTile + column, n);
              if (scales) sum *= load(scales + column, n);
              if (layer > 0) sum += load(totals + r * kTile + column, n);
              store(sum, totals + r * kTile + column, n);
            });
          }
        }
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = (row + r) * a.hidden + first;
          by_vectors(columns, [&](int64_t column, int64_t n) {
            Vec sum = load(totals + r * kTile + column, n);
            if (a.residual) sum += load(static_cast<const T*>(a.residual) + at + column, n);
            store(sum, static_cast<T*>(a.out) + at + column, n);
          });
        }
      }
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
