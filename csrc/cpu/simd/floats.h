// Sixteen floats at a time, written once for every instruction set.
//
// F32x16 is one AVX-512 register, two AVX2 ones or four SSE ones (lanes.h), so that every variant
// adds in the same order. Included only by *_rows.cpp (see isa.h).
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/simd/element_type.h"
#include "cpu/simd/lanes.h"

namespace tq {
namespace TQ_ISA {

constexpr float kMinusInfinity = -__builtin_inff();

// Subtracting 0 from `value` changes no number, so the compiler drops it; adding 0 would change -0.
TQ_INLINE F32x16 broadcast(float value) { return value - F32x16{}; }

TQ_INLINE F32x16 load(const float* from) {
  F32x16 out;
  for_each_piece(
      out, [&](Piece& piece, int i) TQ_INLINED { piece = *reinterpret_cast<const PieceU*>(from + i * kWidth); });
  return out;
}
TQ_INLINE void store(float* to, const F32x16& value) {
  for_each_piece(
      value, [&](const Piece& piece, int i) TQ_INLINED { *reinterpret_cast<PieceU*>(to + i * kWidth) = piece; });
}

// Sixteen words of any kind, on any even address.
TQ_INLINE U32x16 load_words(const void* from) {
  U32x16 out;
  for_each_piece(out, [&](PieceBits& piece, int i) TQ_INLINED { piece = static_cast<const PieceBitsU*>(from)[i]; });
  return out;
}

// a > b ? a : b in every lane: b where either is NaN.
#if defined(__x86_64__)
TQ_INLINE F32x4 max_or_second(F32x4 a, F32x4 b) { return (F32x4)_mm_max_ps((__m128)a, (__m128)b); }
#else
TQ_INLINE F32x4 max_or_second(F32x4 a, F32x4 b) { return a > b ? a : b; }
#endif
#if defined(__AVX2__)
TQ_INLINE F32x8 max_or_second(F32x8 a, F32x8 b) { return (F32x8)_mm256_max_ps((__m256)a, (__m256)b); }
#endif
#if defined(__AVX512F__)
TQ_INLINE F32x16 max_or_second(F32x16 a, F32x16 b) { return (F32x16)_mm512_max_ps((__m512)a, (__m512)b); }
#endif
template <typename Half>
TQ_INLINE Twin<Half> max_or_second(const Twin<Half>& a, const Twin<Half>& b) {
  return {max_or_second(a.low, b.low), max_or_second(a.high, b.high)};
}

// NaN counts as -inf.
TQ_INLINE F32x16 clean(const F32x16& value) { return max_or_second(value, broadcast(kMinusInfinity)); }

// One bit for each lane where !(a < b): at least b, or one of them NaN.
#if defined(__AVX512F__)
TQ_INLINE uint32_t mask_not_lt(Piece a, Piece b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ); }
#elif defined(__AVX2__)
TQ_INLINE uint32_t mask_not_lt(Piece a, Piece b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
}
#elif defined(__x86_64__)
TQ_INLINE uint32_t mask_not_lt(Piece a, Piece b) {
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnlt_ps((__m128)a, (__m128)b)));
}
#else
TQ_INLINE uint32_t mask_not_lt(Piece a, Piece b) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kWidth; ++lane) mask |= static_cast<uint32_t>(!(a[lane] < b[lane])) << lane;
  return mask;
}
#endif
template <typename Half>
TQ_INLINE uint32_t mask_not_lt(const Twin<Half>& a, const Twin<Half>& b) {
  return mask_not_lt(a.low, b.low) | mask_not_lt(a.high, b.high) << Twin<Half>::kHalf;
}

// sum + term in the lanes where !(a < b).
TQ_INLINE F32x16 add_where_not_lt(const F32x16& sum, const F32x16& a, const F32x16& b, const F32x16& term) {
#if defined(__AVX512F__)
  return (F32x16)_mm512_mask_add_ps((__m512)sum, mask_not_lt(a, b), (__m512)sum, (__m512)term);
#else
  return sum + (F32x16)((I32x16)term & ~(I32x16)(a < b));
#endif
}

// Two ways to combine the lanes of two vectors.
struct AddLanes {
  template <typename Vector>
  TQ_INLINE Vector both(const Vector& a, const Vector& b) {
    return a + b;
  }
};
struct MaxLanes {
  template <typename Vector>
  TQ_INLINE Vector both(const Vector& a, const Vector& b) {
    return max_or_second(a, b);
  }
};

// Combines the upper half of the lanes with the lower, until four are left.
template <typename Reduce>
TQ_INLINE F32x4 fold_lanes(F32x4 value) {
  return value;
}
#if defined(__AVX2__)
template <typename Reduce>
TQ_INLINE F32x4 fold_lanes(F32x8 value) {
  return Reduce::both((F32x4)_mm256_castps256_ps128((__m256)value), (F32x4)_mm256_extractf128_ps((__m256)value, 1));
}
#endif
#if defined(__AVX512F__)
template <typename Reduce>
TQ_INLINE F32x4 fold_lanes(F32x16 value) {
  return fold_lanes<Reduce>(
      Reduce::both((F32x8)_mm512_castps512_ps256((__m512)value), (F32x8)_mm512_extractf32x8_ps((__m512)value, 1)));
}
#endif
template <typename Reduce, typename Half>
TQ_INLINE F32x4 fold_lanes(const Twin<Half>& value) {
  return fold_lanes<Reduce>(Reduce::both(value.low, value.high));
}

TQ_INLINE float reduce_max(const F32x16& value) {
  const F32x4 four = fold_lanes<MaxLanes>(value);
  const float even = four[0] > four[2] ? four[0] : four[2];
  const float odd = four[1] > four[3] ? four[1] : four[3];
  return even > odd ? even : odd;
}

TQ_INLINE float add_lanes(const F32x16& value) {
  const F32x4 four = fold_lanes<AddLanes>(value);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

TQ_INLINE F32x16 select(const I32x16& condition, const F32x16& yes, const F32x16& no) {
  return (F32x16)(((I32x16)yes & condition) | ((I32x16)no & ~condition));
}

// Adds pairwise, in an order that is the same for every variant.
TQ_INLINE double reduce_sum(const F32x16& value) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)value));
  const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)value, 1)));
  return _mm512_reduce_add_pd(low + high);
#else
  float lanes[kLanes];
  store(lanes, value);
  double pairs[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) pairs[i] = static_cast<double>(lanes[i]) + lanes[i + kLanes / 2];
  return ((pairs[0] + pairs[4]) + (pairs[2] + pairs[6])) + ((pairs[1] + pairs[5]) + (pairs[3] + pairs[7]));
#endif
}

TQ_INLINE float float_from_half(uint16_t half) {
  // Multiplying by 2^112 moves the exponent to its place and makes subnormals right; infinities
  // and NaN keep an all-ones exponent.
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  float scaled;
  __builtin_memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, sizeof bits);
  bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  bits |= sign;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even.
TQ_INLINE uint16_t bfloat16_from(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

TQ_INLINE uint16_t half_from(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7e00u;
  if (size >= 0x477ff000u) return sign | 0x7c00u;
  if (size < 0x38800000u) {
    // Adding 0.5 leaves the subnormal's bits at the bottom of the sum, rounded by the addition.
    float magnitude;
    __builtin_memcpy(&magnitude, &size, sizeof magnitude);
    const float shifted = magnitude + 0.5f;
    uint32_t shifted_bits;
    __builtin_memcpy(&shifted_bits, &shifted, sizeof shifted_bits);
    return static_cast<uint16_t>(sign | (shifted_bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
}

// Conversions of one stored element type to floats and, rounded, back. `Stored` is the type in memory.
struct Float32 {
  using Stored = float;
  TQ_INLINE float rounded(float value) { return value; }
  TQ_INLINE void store_rounded(float* to, const F32x16& value) { store(to, value); }
  TQ_INLINE float scalar(float stored) { return stored; }
  TQ_INLINE F32x16 vector(const float* from) { return load(from); }
};

struct BFloat16 {
  using Stored = uint16_t;
  TQ_INLINE uint16_t rounded(float value) { return bfloat16_from(value); }
  // The bits of the nearest bf16 numbers.
  TQ_INLINE U32x16 rounded_bits(const F32x16& value) {
    const U32x16 bits = (U32x16)value;
    const U32x16 high = bits >> 16;
    const U32x16 up = (bits + 0x7fffu + (high & 1u)) >> 16;
    const U32x16 is_number = (U32x16)(value == value);
    return (up & is_number) | ((high | 0x40u) & ~is_number);
  }
  TQ_INLINE void store_rounded(uint16_t* to, const F32x16& value) {
    const U32x16 bits = rounded_bits(value);
    for_each_piece(bits, [&](const PieceBits& piece, int i) TQ_INLINED {
      reinterpret_cast<PieceShortsU*>(to)[i] = __builtin_convertvector(piece, PieceShorts);
    });
  }
  TQ_INLINE float scalar(uint16_t stored) {
    const uint32_t bits = static_cast<uint32_t>(stored) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  TQ_INLINE F32x16 vector(const uint16_t* from) {
    F32x16 out;
    for_each_piece(out, [&](Piece& piece, int i) TQ_INLINED {
      const PieceShorts stored = reinterpret_cast<const PieceShortsU*>(from)[i];
      piece = (Piece)(__builtin_convertvector(stored, PieceBits) << 16);
    });
    return out;
  }
};

struct Float16 {
  using Stored = uint16_t;
  TQ_INLINE uint16_t rounded(float value) { return half_from(value); }
  TQ_INLINE void store_rounded(uint16_t* to, const F32x16& value) {
    for_each_piece(value, [&](const Piece& piece, int i) TQ_INLINED { store_piece(to + i * kWidth, piece); });
  }
  TQ_INLINE float scalar(uint16_t stored) { return float_from_half(stored); }
  TQ_INLINE F32x16 vector(const uint16_t* from) {
    F32x16 out;
    for_each_piece(out, [&](Piece& piece, int i) TQ_INLINED { piece = load_piece(from + i * kWidth); });
    return out;
  }
  TQ_INLINE void store_piece(uint16_t* to, Piece piece) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_cvtps_ph((__m512)piece, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)piece, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < kWidth; ++lane) to[lane] = half_from(piece[lane]);
#endif
  }
  TQ_INLINE Piece load_piece(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Piece)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return (Piece)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Piece out;
    for (int lane = 0; lane < kWidth; ++lane) out[lane] = float_from_half(from[lane]);
    return out;
#endif
  }
};

}  // namespace TQ_ISA
}  // namespace tq
