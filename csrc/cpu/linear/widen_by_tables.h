// int8 numbers as bf16, sixty-four at a time, by tables of their bytes. Included only by
// widen_weights_rows.cpp.
#pragma once

#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

#if defined(__AVX512F__)

// The bytes of the bf16 numbers from 0 to 127.
struct ByteTables {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

constexpr ByteTables make_byte_tables() {
  ByteTables tables{};
  for (int number = 1; number < 128; ++number) {
    int power = 0;
    while (number >> (power + 1) != 0) ++power;
    const int bits = (127 + power) << 7 | ((number << (7 - power)) & 0x7f);
    tables.low[number] = static_cast<uint8_t>(bits & 0xff);
    tables.high[number] = static_cast<uint8_t>(bits >> 8);
  }
  return tables;
}

inline constexpr ByteTables kByteTables = make_byte_tables();

constexpr int64_t kNumbersOfTables = 64;

// Rows of `columns` numbers, `stride` apart, to rows `to_stride` apart. Both bytes of a magnitude are looked
// up, and the sign is put beside them.
__attribute__((target("avx512vbmi"))) inline void widen_by_tables(
    const int8_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to, int64_t to_stride) {
  const __m512i low_first = _mm512_load_si512(kByteTables.low);
  const __m512i low_second = _mm512_load_si512(kByteTables.low + 64);
  const __m512i high_first = _mm512_load_si512(kByteTables.high);
  const __m512i high_second = _mm512_load_si512(kByteTables.high + 64);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  // bf16 of 128, whose lower byte is zero as that of 0.
  const __m512i high_of_128 = _mm512_set1_epi8(0x43);
  // Interleaving bytes takes the two halves of each 128 bits apart; this order makes up for it.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t row = 0; row < rows; ++row, from += stride, to += to_stride) {
    int64_t i = 0;
    for (; i + kNumbersOfTables <= columns; i += kNumbersOfTables) {
      const __m512i number = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + i));
      const __m512i magnitude = _mm512_abs_epi8(number);
      const __m512i low = _mm512_permutex2var_epi8(low_first, magnitude, low_second);
      __m512i high = _mm512_permutex2var_epi8(high_first, magnitude, high_second);
      high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitude), high_of_128);
      // high | (number & sign)
      high = _mm512_ternarylogic_epi32(high, number, sign, 0xf8);
      _mm512_storeu_si512(to + i, _mm512_unpacklo_epi8(low, high));
      _mm512_storeu_si512(to + i + 32, _mm512_unpackhi_epi8(low, high));
    }
    for (; i < columns; ++i) to[i] = bfloat16_from(static_cast<float>(from[i]));
  }
}

#endif

}  // namespace TQ_ISA
}  // namespace tq
