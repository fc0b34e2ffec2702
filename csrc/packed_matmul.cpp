#include "packed_matmul.h"

#include <type_traits>

#include "skinny_matmul.h"

namespace easyspec {
namespace {

// A sign and 7 bits of a magnitude, of -127 to 127.
struct Int8 {
  uint8_t bits;
};
// e4m3fn
struct Float8 {
  uint8_t bits;
};
// Two bfloat16, the first in the low half: what a step of a dot product of pairs reads.
struct __attribute__((may_alias)) Pair {
  uint32_t bits;
};

typedef uint8_t Bytes __attribute__((vector_size(64)));
constexpr uint32_t kHighHalf = 0xffff0000u;

#ifdef __AVX512F__
constexpr int kVectors = 4;  // of columns side by side: with kMostRows rows 24 sums, in 32 registers
#else
constexpr int kVectors = 1;
#endif
constexpr int64_t kMostRows = 6;
// Steps of a tile at a time, which all rows read from the first cache: 32 KiB. Where numbers are converted for few
// rows, less, so that memory is read meanwhile.
constexpr int64_t kSteps = 128, kStepsOfFewRows = 32, kFewRows = 8;

EASYSPEC_BODY Vec magnitude(VecBits code, Int8) { return __builtin_convertvector(code, Vec); }

// The exponent and the mantissa, read as a float32's, are 2^120 times too small, also those of subnormal numbers.
EASYSPEC_BODY Vec magnitude(VecBits code, Float8) { return std::bit_cast<Vec>(code << 20) * 0x1p120f; }

template <class W>
EASYSPEC_BODY Vec of_code(VecBits code) {
  return std::bit_cast<Vec>(std::bit_cast<VecBits>(magnitude(code & 0x7f, W{})) | (code & 0x80) << 24);
}

// The pairs of 32 columns: of 16 bits each, as they lie there. Of 8 bits, the first 16 columns' and the last 16
// columns' pairs take turns, 8 bytes each, as x86's instructions interleave bytes.
template <class W>
EASYSPEC_BODY void load_pairs(const W* from, Vec (&first)[2], Vec (&second)[2]) {
  if constexpr (sizeof(W) == 1) {
    for (int half = 0; half < 2; ++half) {
      VecHalfBits pairs;
      for (int part = 0; part < 4; ++part) {
        std::memcpy(reinterpret_cast<char*>(&pairs) + 8 * part, from + 16 * part + 8 * half, 8);
      }
      const VecBits codes = __builtin_convertvector(pairs, VecBits);
      first[half] = of_code<W>(codes);
      second[half] = of_code<W>(codes >> 8);
    }
  } else {
    for (int half = 0; half < 2; ++half) {
      VecBits pairs;
      std::memcpy(&pairs, from + 2 * kVec * half, sizeof(pairs));
      if constexpr (std::is_same_v<W, BFloat16>) {
        first[half] = std::bit_cast<Vec>(pairs << 16);
        second[half] = std::bit_cast<Vec>(pairs & kHighHalf);
      } else {  // float16, as Float8
        const auto number = [](VecBits bits) {
          const Vec magnitude = std::bit_cast<Vec>((bits & 0x7fff) << 13) * 0x1p112f;
          return std::bit_cast<Vec>(std::bit_cast<VecBits>(magnitude) | (bits & 0x8000) << 16);
        };
        first[half] = number(pairs);
        second[half] = number(pairs >> 16);
      }
    }
  }
}

// A packed tile's next steps as products of float32 read them, [2 * steps, kTile].
template <class W>
const float* converted(const W* packed, int64_t steps, float* memory) {
  for (int64_t i = 0; i < steps; ++i) {
    for (int64_t column = 0; column < kTile; column += 2 * kVec) {
      Vec first[2], second[2];
      load_pairs(packed + (i * kTile + column) * 2, first, second);
      for (int half = 0; half < 2; ++half) {
        store(first[half], memory + 2 * i * kTile + column + half * kVec);
        store(second[half], memory + (2 * i + 1) * kTile + column + half * kVec);
      }
    }
  }
  return memory;
}

const float* converted(const float* packed, int64_t, float*) { return packed; }

EASYSPEC_BODY void multiply_add(Vec& sum, Vec weights, float factor) { sum += weights * factor; }

#ifdef __AVX512F__
// Instructions by name where processors that this build serves may lack them.
EASYSPEC_BODY void multiply_add(Vec& sum, Vec weights, Pair factor) {
  const VecBits factors = VecBits{} + factor.bits;
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(factors));
}

EASYSPEC_BODY Bytes look_up(Bytes codes, const Bytes (&table)[2]) {
  asm("vpermi2b %2, %1, %0" : "+v"(codes) : "v"(table[0]), "v"(table[1]));
  return codes;
}

// The magnitudes of all codes in bfloat16, low and high bytes.
template <class W>
struct Magnitudes {
  Bytes low[2], high[2];

  Magnitudes() {
    uint8_t lows[128], highs[128];
    for (uint32_t code = 0; code < 128; ++code) {
      const uint32_t bits = std::bit_cast<VecBits>(magnitude(VecBits{} + code, W{}))[0];
      lows[code] = static_cast<uint8_t>(bits >> 16);
      highs[code] = static_cast<uint8_t>(bits >> 24);
    }
    std::memcpy(low, lows, sizeof(lows));
    std::memcpy(high, highs, sizeof(highs));
  }
};

// A packed tile's next steps as products of pairs read them, [steps, kTile].
template <class W>
const Pair* converted(const W* packed, int64_t steps, Pair* memory) {
  static const Magnitudes<W> magnitudes;
  for (int64_t i = 0; i < steps * kTile; i += 2 * kVec) {
    Bytes codes, first, last;
    std::memcpy(&codes, packed + 2 * i, sizeof(codes));
    const Bytes lows = look_up(codes, magnitudes.low), highs = look_up(codes, magnitudes.high) | (codes & 0x80);
    asm("vpunpcklbw %2, %1, %0" : "=v"(first) : "v"(lows), "v"(highs));
    asm("vpunpckhbw %2, %1, %0" : "=v"(last) : "v"(lows), "v"(highs));
    std::memcpy(static_cast<void*>(memory + i), &first, sizeof(first));
    std::memcpy(static_cast<void*>(memory + i + kVec), &last, sizeof(last));
  }
  return memory;
}

const Pair* converted(const BFloat16* packed, int64_t, Pair*) { return reinterpret_cast<const Pair*>(packed); }
#endif

// sums [R, kTile] += x [R, steps] times w [steps, kTile].
template <int R, class S>
EASYSPEC_BODY void add_products(const S* x, int64_t x_stride, const S* w, int64_t steps, float* sums) {
  for (int64_t column = 0; column < kTile; column += kVectors * kVec) {
    Vec totals[R][kVectors];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) totals[r][v] = load(sums + r * kTile + column + v * kVec);
    }
    for (int64_t i = 0; i < steps; ++i) {
      Vec weights[kVectors];
      for (int v = 0; v < kVectors; ++v) std::memcpy(&weights[v], w + i * kTile + column + v * kVec, sizeof(Vec));
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kVectors; ++v) multiply_add(totals[r][v], weights[v], x[r * x_stride + i]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) store(totals[r][v], sums + r * kTile + column + v * kVec);
    }
  }
}

// The same of any number of rows, in blocks of nearly one size.
template <class S>
void add_products(const S* x, int64_t x_stride, const S* w, int64_t steps, int64_t rows, float* sums) {
  for (int64_t blocks = (rows + kMostRows - 1) / kMostRows; blocks > 0; --blocks) {
    const int64_t count = (rows + blocks - 1) / blocks;
    switch (count) {
      case 1:
        add_products<1>(x, x_stride, w, steps, sums);
        break;
      case 2:
        add_products<2>(x, x_stride, w, steps, sums);
        break;
      case 3:
        add_products<3>(x, x_stride, w, steps, sums);
        break;
      case 4:
        add_products<4>(x, x_stride, w, steps, sums);
        break;
      case 5:
        add_products<5>(x, x_stride, w, steps, sums);
        break;
      default:
        add_products<6>(x, x_stride, w, steps, sums);
    }
    x += count * x_stride;
    sums += count * kTile;
    rows -= count;
  }
}

// S: what a row has for each step of the product; a step of float32 is half a step of a packed tile of pairs.
template <class S, class W>
void multiply(const Rows& x, const W* tile, int64_t steps, int64_t rows, float* sums) {
  constexpr int64_t kNumbers = std::is_same_v<W, float> ? 1 : 2;  // of a column in a step of the tile
  constexpr int64_t kTimes = std::is_same_v<S, Pair> ? 1 : kNumbers;
  constexpr bool kConverts = kTimes == 2 || sizeof(W) == 1;
  alignas(64) S memory[kConverts ? kSteps * kTile : 1];
  const int64_t at_once = (kConverts && rows <= kFewRows ? kStepsOfFewRows : kSteps) / kTimes;
  const int64_t x_stride = x.width / (std::is_same_v<S, Pair> ? 2 : 1);
  std::memset(sums, 0, rows * kTile * sizeof(float));
  for (int64_t step = 0; step < steps; step += at_once) {
    const int64_t count = std::min(at_once, steps - step);
    const S* w = converted(tile + step * kTile * kNumbers, count, memory);
    add_products(static_cast<const S*>(x.numbers) + step * kTimes, x_stride, w, count * kTimes, rows, sums);
  }
}

template <class F>
void with_weights(WeightType type, F f) {
  switch (type) {
    case WeightType::kFloat32:
      return f(float{});
    case WeightType::kBFloat16:
      return f(BFloat16{});
    case WeightType::kFloat16:
      return f(Float16{});
    case WeightType::kInt8:
      return f(Int8{});
    case WeightType::kFloat8:
      return f(Float8{});
  }
}

}  // namespace

bool multiplies_pairs(DType dtype, WeightType type) {
#ifdef __AVX512F__
  static const bool has_dot = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return has_dot && dtype == DType::kBFloat16 && type != WeightType::kFloat32 && type != WeightType::kFloat16;
#else
  return false;
#endif
}

void multiply_tile(
    const Rows& x, const PackedMatrices& matrices, int64_t layer, int64_t tile, int64_t rows, float* sums) {
  with_weights(matrices.type, [&](auto type) {
    using W = decltype(type);
    const int64_t numbers = row_width(matrices) * kTile;
    const W* from = static_cast<const W*>(matrices.numbers) + (layer * matrices.tiles + tile) * numbers;
#ifdef __AVX512F__
    if constexpr (!std::is_same_v<W, float> && !std::is_same_v<W, Float16>) {
      if (x.are_pairs) return multiply<Pair>(x, from, matrices.steps, rows, sums);
    }
#endif
    multiply<float>(x, from, matrices.steps, rows, sums);
  });
}

}  // namespace easyspec
