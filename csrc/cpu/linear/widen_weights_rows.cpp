#include "cpu/linear/widen_weights_rows.h"

#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

namespace {

typedef int8_t PieceBytes __attribute__((vector_size(kWidth)));
typedef int8_t PieceBytesU __attribute__((vector_size(kWidth), aligned(1), may_alias));

TQ_INLINE F32x16 floats_of(const int8_t* from) {
  F32x16 out;
  for_each_piece(out, [&](Piece& piece, int i) TQ_INLINED {
    const PieceBytes bytes = reinterpret_cast<const PieceBytesU*>(from)[i];
    piece = __builtin_convertvector(bytes, Piece);
  });
  return out;
}

template <typename Element>
TQ_INLINE void store_exact(typename Element::Stored* to, const F32x16& value) {
  Element::store_rounded(to, value);
}

// The lower half of the float of an int8 is zero.
template <>
TQ_ALWAYS_INLINE void store_exact<BFloat16>(uint16_t* to, const F32x16& value) {
  const U32x16 high = (U32x16)value >> 16;
  for_each_piece(high, [&](const PieceBits& piece, int i) TQ_INLINED {
    reinterpret_cast<PieceShortsU*>(to)[i] = __builtin_convertvector(piece, PieceShorts);
  });
}

template <typename Element>
void widen_row(const int8_t* from, int64_t columns, typename Element::Stored* to) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) store_exact<Element>(to + i, floats_of(from + i));
  for (; i < columns; ++i) to[i] = Element::rounded(static_cast<float>(from[i]));
}

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

constexpr ByteTables kByteTables = make_byte_tables();

// Sixty-four numbers at a time: both bytes of a magnitude are looked up, and the sign is put beside them.
__attribute__((target("avx512vbmi"))) void widen_row_by_tables(const int8_t* from, int64_t columns, uint16_t* to) {
  const __m512i low_first = _mm512_load_si512(kByteTables.low);
  const __m512i low_second = _mm512_load_si512(kByteTables.low + 64);
  const __m512i high_first = _mm512_load_si512(kByteTables.high);
  const __m512i high_second = _mm512_load_si512(kByteTables.high + 64);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  // bf16 of 128, whose lower byte is zero as that of 0.
  const __m512i high_of_128 = _mm512_set1_epi8(0x43);
  // Interleaving bytes takes the two halves of each 128 bits apart; this order makes up for it.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
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
#endif

template <typename Element>
void widen_rows(const WidenedWeights& widened) {
  auto* const to = static_cast<typename Element::Stored*>(widened.to);
  for (int64_t row = 0; row < widened.rows; ++row) {
    widen_row<Element>(widened.from + row * widened.stride, widened.columns, to + row * widened.to_stride);
  }
}

}  // namespace

void widen_weights(const WidenedWeights& widened) {
  switch (widened.type) {
    case ElementType::kFloat32:
      return widen_rows<Float32>(widened);
    case ElementType::kFloat16:
      return widen_rows<Float16>(widened);
    case ElementType::kBFloat16:
      break;
  }
#if defined(__AVX512F__)
  if (widened.use_byte_tables) {
    for (int64_t row = 0; row < widened.rows; ++row) {
      widen_row_by_tables(
          widened.from + row * widened.stride, widened.columns,
          static_cast<uint16_t*>(widened.to) + row * widened.to_stride);
    }
    return;
  }
#endif
  widen_rows<BFloat16>(widened);
}

}  // namespace TQ_ISA
}  // namespace tq
