// Sixteen floats at a time, written once for every instruction set.
//
// The compiler's vector extension lowers F32x16 to one AVX-512 register, two AVX2 ones or four SSE
// ones, so that every variant adds in the same order. Included only by *_rows.cpp (see isa.h).
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/row_types.h"

#define TQ_ALWAYS_INLINE inline __attribute__((always_inline))
#define TQ_INLINE static TQ_ALWAYS_INLINE

namespace tq {
namespace TQ_ISA {

constexpr int kLanes = 16;

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
// For unaligned access through pointers.
typedef float F32x16u __attribute__((vector_size(64), aligned(4)));
typedef uint16_t U16x16u __attribute__((vector_size(32), aligned(2)));

constexpr float kMinusInfinity = -__builtin_inff();

TQ_INLINE F32x16 broadcast(float value) { return F32x16{} + value; }

TQ_INLINE F32x16 load(const float* from) { return *reinterpret_cast<const F32x16u*>(from); }
TQ_INLINE void store(float* to, F32x16 value) { *reinterpret_cast<F32x16u*>(to) = value; }

// a > b ? a : b in every lane: b where either is NaN.
TQ_INLINE F32x16 max_or_second(F32x16 a, F32x16 b) {
#if defined(__AVX512F__)
  return (F32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// NaN counts as -inf.
TQ_INLINE F32x16 clean(F32x16 value) { return max_or_second(value, broadcast(kMinusInfinity)); }

// One bit for each lane where !(a <= b): greater, or b is NaN.
TQ_INLINE uint32_t mask_not_le(F32x16 a, F32x16 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#else
  const I32x16 le = a <= b;
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(le[lane] == 0) << lane;
  return mask;
#endif
}

TQ_INLINE float reduce_max(F32x16 value) {
  float best = value[0];
  for (int lane = 1; lane < kLanes; ++lane) best = value[lane] > best ? value[lane] : best;
  return best;
}

// Pairwise, so that the order is the same for every variant.
TQ_INLINE double reduce_sum(F32x16 value) {
  double pairs[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) pairs[i] = static_cast<double>(value[i]) + value[i + kLanes / 2];
  return ((pairs[0] + pairs[4]) + (pairs[2] + pairs[6])) + ((pairs[1] + pairs[5]) + (pairs[3] + pairs[7]));
}

// exp(x) for x in [-87.3, 0], within 2 units in the last place: 2^whole * 2^rest, |rest| <= 1/2,
// the second by a polynomial fitted to a relative error of 9e-8 with exp(0) = 1 exactly.
TQ_INLINE F32x16 exp_in_range(F32x16 x) {
  const F32x16 log2_e = broadcast(1.44269504088896341f);
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits of the float.
  const F32x16 magic = broadcast(12582912.0f);
  const F32x16 shifted = x * log2_e + magic;
  const F32x16 whole = shifted - magic;
  const F32x16 rest = x * log2_e - whole;
  F32x16 poly = rest * 1.3264727e-3f + 9.6715128e-3f;
  poly = poly * rest + 5.5507337e-2f;
  poly = poly * rest + 2.4022242e-1f;
  poly = poly * rest + 6.9314698e-1f;
  poly = poly * rest + 1.0f;
  return (F32x16)((U32x16)poly + ((U32x16)shifted << 23));
}

constexpr float kLowestExponent = -87.0f;

// exp(x) for x <= 0 where a term below 1e-37 does not matter: there it is 1.6e-38, for -inf too.
TQ_INLINE F32x16 exp_for_sum(F32x16 x) { return exp_in_range(max_or_second(x, broadcast(kLowestExponent))); }

// exp(x) for x <= 0; exactly 0 below exp(-87), so for -inf too.
TQ_INLINE F32x16 exp_nonpositive(F32x16 x) {
  const F32x16 result = exp_for_sum(x);
#if defined(__AVX512F__)
  const __mmask16 is_in_range = _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(kLowestExponent), _CMP_GE_OQ);
  return (F32x16)_mm512_maskz_mov_ps(is_in_range, (__m512)result);
#else
  return (F32x16)((I32x16)result & (x >= broadcast(kLowestExponent)));
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

// How one stored element type becomes floats. `Stored` is the type in memory.
struct Float32 {
  using Stored = float;
  TQ_INLINE float scalar(float stored) { return stored; }
  TQ_INLINE F32x16 vector(const float* from) { return load(from); }
};

struct BFloat16 {
  using Stored = uint16_t;
  TQ_INLINE float scalar(uint16_t stored) {
    const uint32_t bits = static_cast<uint32_t>(stored) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
  TQ_INLINE F32x16 vector(const uint16_t* from) {
    return (F32x16)(__builtin_convertvector(*reinterpret_cast<const U16x16u*>(from), U32x16) << 16);
  }
};

struct Float16 {
  using Stored = uint16_t;
  TQ_INLINE float scalar(uint16_t stored) { return float_from_half(stored); }
  TQ_INLINE F32x16 vector(const uint16_t* from) {
#if defined(__AVX512F__)
    return (F32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    union {
      __m256 halves[2];
      F32x16 whole;
    } out;
    out.halves[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    out.halves[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)));
    return out.whole;
#else
    F32x16 out;
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = float_from_half(from[lane]);
    return out;
#endif
  }
};

}  // namespace TQ_ISA
}  // namespace tq
