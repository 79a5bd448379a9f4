// Rows of bf16 numbers times an int8 weight matrix in the tile registers of AMX. Weights are read as they lie in
// memory, 64 columns of sixteen outputs a tile, and multiplied as integers. Included only by linear_rows.cpp.
//
// A row of x is written as integers of 24 bits, in units of 2^-22 of the largest power of two in it: exactly, but for
// numbers below 2^-15 of that, which are rounded. 2^23 is added to the integers, which makes three unsigned bytes of
// them, each of them one column of a tile, and a column of ones gives the sums of the weights by which it is taken
// off again: ten rows fill two tiles. Sums of integers are exact, in whatever order: they depend on neither the
// other rows nor the threads. A row with a number that is not finite becomes NaN.
#pragma once

#include "cpu/linear/linear_amx.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/transpose.h"

namespace tq {
namespace TQ_ISA {

#if defined(__AVX512F__)

constexpr int64_t kInt8Columns = 64;
constexpr int64_t kInt8TileBytes = kAmxRows * kInt8Columns;
constexpr int64_t kDigits = 3;
// The bits below the largest power of two, with which the integers are below 2^23.
constexpr int32_t kFractionBits = 22;

constexpr int64_t int8_tiles(int64_t rows) { return kDigits * rows + 1 > kAmxRows ? 2 : 1; }

// 2^exponent, for exponents of normal floats.
TQ_INLINE float power_of_two(int32_t exponent) {
  const int32_t bits = (exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The exponent by which a row of bf16 numbers is multiplied, which leaves no integer too large and both it and its
// negative normal; false where a number is not finite.
inline bool find_exponent(const uint16_t* row, int64_t size, int32_t* exponent) {
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  for (int64_t i = 0; i < size; i += 32) {
    const int64_t left = size - i;
    const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, row + i), magnitude));
  }
  alignas(64) uint16_t lanes[32];
  _mm512_store_si512(lanes, most);
  int32_t largest = 0;
  for (const uint16_t lane : lanes) largest = lane > largest ? lane : largest;
  const int32_t found = kFractionBits - ((largest >> 7) - 127);
  *exponent = found > 126 ? 126 : found;
  return largest < 0x7f80;
}

// The bytes of sixteen integers, the lowest first, after 2^23 was added.
TQ_INLINE void store_digits(__m512i number, uint8_t* to, int64_t stride) {
  number = _mm512_add_epi32(number, _mm512_set1_epi32(1 << 23));
  for (int digit = 0; digit < kDigits; ++digit, to += stride) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(number));
    number = _mm512_srli_epi32(number, 8);
  }
}

// Where the groups of rows lie in the packed x, and behind them the unit of each row.
struct Int8Packing {
  int64_t steps;
  int64_t num_groups;

  explicit Int8Packing(const FewRowsProduct& product)
      : steps(int8_steps(product.size_in)), num_groups(int8_groups(product.rows)) {}
  int64_t group_bytes() const { return 2 * steps * kInt8TileBytes; }
  uint8_t* group(void* packed, int64_t i) const { return static_cast<uint8_t*>(packed) + i * group_bytes(); }
  float* units(void* packed) const { return reinterpret_cast<float*>(group(packed, num_groups)); }
};

// Packs the groups [first, last) of rows of x: tile by tile, step by step of 64 columns, as [four columns][digit].
// Digit d of row r of a group of G is column d * G + r; the column of ones is the next after them.
inline void pack_int8(
    const FewRowsProduct& product, const void* x, int64_t x_stride, void* to, int64_t first, int64_t last) {
  const Int8Packing packing(product);
  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * kInt8GroupRows;
    const int64_t count = product.rows - begin < kInt8GroupRows ? product.rows - begin : kInt8GroupRows;
    const auto* const rows = static_cast<const uint16_t*>(x) + begin * x_stride;
    float factors[kInt8GroupRows];
    for (int64_t r = 0; r < count; ++r) {
      int32_t exponent;
      const bool is_finite = find_exponent(rows + r * x_stride, product.size_in, &exponent);
      factors[r] = is_finite ? power_of_two(exponent) : 0.0f;
      packing.units(to)[begin + r] = is_finite ? power_of_two(-exponent) : __builtin_nanf("");
    }
    const int64_t tiles = int8_tiles(count);
    uint8_t* const out = packing.group(to, group);
    for (int64_t step = 0; step < packing.steps; ++step) {
      alignas(64) uint8_t digits[2 * kAmxRows][kInt8Columns] = {};
      for (uint8_t& one : digits[kDigits * count]) one = 1;
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < kInt8Columns && step * kInt8Columns + i < product.size_in; i += kLanes) {
          const int64_t column = step * kInt8Columns + i;
          const int64_t left = product.size_in - column;
          const __mmask16 mask = left >= kLanes ? 0xffff : (1u << left) - 1;
          const __m256i halves = _mm256_maskz_loadu_epi16(mask, rows + r * x_stride + column);
          const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
          const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(factors[r])));
          // What becomes of a number that is not finite is never used.
          store_digits(number, &digits[r][i], count * kInt8Columns);
        }
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        __m512 words[kAmxRows];
        for (int64_t i = 0; i < kAmxRows; ++i) words[i] = _mm512_load_ps(digits[tile * kAmxRows + i]);
        transpose_in_registers(words);
        uint8_t* const at = out + (tile * packing.steps + step) * kInt8TileBytes;
        for (int64_t i = 0; i < kAmxRows; ++i) _mm512_store_ps(at + i * kInt8Columns, words[i]);
      }
    }
  }
}

// One thread's share of a product, in panels of kOutputsTogether outputs, which all groups of rows meet.
class AmxInt8Share {
 public:
  AmxInt8Share(const FewRowsProduct& product, int64_t end)
      : product_(product), weight_(static_cast<const int8_t*>(product.weight)), end_(end), packing_(product) {}

  void multiply(int64_t begin) const {
    const AmxRegisters registers;
    for (int64_t first = begin; first < end_; first += kOutputsTogether) {
      for (int64_t group = 0; group < packing_.num_groups; ++group) {
        const int64_t left = product_.rows - group * kInt8GroupRows;
        const int64_t count = left < kInt8GroupRows ? left : kInt8GroupRows;
        int8_tiles(count) == 2 ? multiply_panel<2>(first, group, count) : multiply_panel<1>(first, group, count);
      }
    }
  }

 private:
  static constexpr int64_t kTileOutputs = kOutputsTogether / 2;

  template <int kTiles>
  void multiply_panel(int64_t first, int64_t group, int64_t count) const {
    const int64_t last = first + kOutputsTogether < end_ ? first + kOutputsTogether : end_;
    const int64_t whole = last - first == kOutputsTogether ? product_.size_in / kInt8Columns : 0;
    const int64_t stride = product_.weight_stride;
    const uint8_t* const x = packing_.group(const_cast<void*>(product_.packed_x), group);
    const int64_t lines = lines_ahead(product_, group, packing_.num_groups);
    amx_clear<0>();
    amx_clear<1>();
    amx_clear<2>();
    amx_clear<3>();
    for (int64_t step = 0; step < whole; ++step) {
      const int8_t* const weights = weight_ + first * stride + step * kInt8Columns;
      if (lines > 0) product_.ahead->advance(lines);
      add_step<kTiles>(weights, weights + kTileOutputs * stride, stride, x + step * kInt8TileBytes);
    }
    for (int64_t step = whole; step < packing_.steps; ++step) {
      alignas(64) int8_t padded[kOutputsTogether * kInt8Columns] = {};
      const int64_t left = product_.size_in - step * kInt8Columns;
      for (int64_t row = first; row < last; ++row) {
        const int8_t* const from = weight_ + row * stride + step * kInt8Columns;
        for (int64_t c = 0; c < left && c < kInt8Columns; ++c) padded[(row - first) * kInt8Columns + c] = from[c];
      }
      add_step<kTiles>(padded, padded + kInt8TileBytes, kInt8Columns, x + step * kInt8TileBytes);
    }
    finish<kTiles>(first, last, group, count);
  }

  // Adds the products of 64 columns: the sums of x tile t and weight tile w are register 2 * w + t.
  template <int kTiles>
  TQ_ALWAYS_INLINE void add_step(
      const int8_t* weights, const int8_t* more_weights, int64_t stride, const uint8_t* x) const {
    amx_load<4>(weights, stride);
    amx_load<6>(x, kAmxRowBytes);
    amx_multiply_int8<0, 4, 6>();
    if (kTiles == 2) {
      amx_load<7>(x + packing_.steps * kInt8TileBytes, kAmxRowBytes);
      amx_multiply_int8<1, 4, 7>();
    }
    amx_load<5>(more_weights, stride);
    amx_multiply_int8<2, 5, 6>();
    if (kTiles == 2) amx_multiply_int8<3, 5, 7>();
  }

  // Adds the digits' sums up and turns them into outputs.
  template <int kTiles>
  void finish(int64_t first, int64_t last, int64_t group, int64_t count) const {
    alignas(64) int32_t sums_of[kTiles][kOutputsTogether][kAmxRows];
    amx_store<0>(sums_of[0], kAmxRowBytes);
    amx_store<2>(sums_of[0][kTileOutputs], kAmxRowBytes);
    if (kTiles == 2) amx_store<1>(sums_of[kTiles - 1], kAmxRowBytes);
    if (kTiles == 2) amx_store<3>(sums_of[kTiles - 1][kTileOutputs], kAmxRowBytes);
    alignas(64) float sums[kInt8GroupRows * kOutputsTogether];
    const float* const units = packing_.units(const_cast<void*>(product_.packed_x)) + group * kInt8GroupRows;
    for (int64_t part = 0; part < kOutputsTogether; part += kTileOutputs) {
      __m512 columns[kTiles * kAmxRows];
      for (int tile = 0; tile < kTiles; ++tile) {
        __m512* const words = columns + tile * kAmxRows;
        for (int64_t i = 0; i < kAmxRows; ++i) words[i] = _mm512_load_ps(sums_of[tile][part + i]);
        transpose_in_registers(*reinterpret_cast<__m512(*)[kAmxRows]>(words));
      }
      // What adding 2^23 to each number has added to the sum of the highest digits.
      const __m512i added = _mm512_slli_epi32(_mm512_castps_si512(columns[kDigits * count]), 7);
      for (int64_t r = 0; r < count; ++r) {
        const auto digits_of = [&](int64_t digit) { return _mm512_castps_si512(columns[digit * count + r]); };
        const __m512i highest = _mm512_sub_epi32(digits_of(2), added);
        __m512 sum = _mm512_cvtepi32_ps(highest);
        for (int64_t digit = 1; digit >= 0; --digit) {
          sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(digits_of(digit)));
        }
        _mm512_store_ps(sums + r * kOutputsTogether + part, _mm512_mul_ps(sum, _mm512_set1_ps(units[r])));
      }
    }
    const int64_t begin = group * kInt8GroupRows;
    finish_rows<BFloat16>(product_, begin, begin + count, first, last, sums, kOutputsTogether);
  }

  const FewRowsProduct& product_;
  const int8_t* weight_;
  int64_t end_;
  Int8Packing packing_;
};

#endif

}  // namespace TQ_ISA
}  // namespace tq
