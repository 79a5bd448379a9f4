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

// Subtracting 0 leaves every number as it is, so nothing is computed; adding it would change -0.
TQ_INLINE F32x16 broadcast(float value) { return value - F32x16{}; }

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
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float best = value[0];
  for (int lane = 1; lane < kLanes; ++lane) best = value[lane] > best ? value[lane] : best;
  return best;
#endif
}

TQ_INLINE float add_lanes(F32x16 value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float quads[4];
  for (int i = 0; i < 4; ++i) quads[i] = (value[i] + value[i + 8]) + (value[i + 4] + value[i + 12]);
  return (quads[0] + quads[2]) + (quads[1] + quads[3]);
#endif
}

TQ_INLINE F32x16 select(I32x16 condition, F32x16 yes, F32x16 no) {
  return (F32x16)(((I32x16)yes & condition) | ((I32x16)no & ~condition));
}

// Pairwise, so that the order is the same for every variant.
TQ_INLINE double reduce_sum(F32x16 value) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)value));
  const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)value, 1)));
  return _mm512_reduce_add_pd(low + high);
#else
  double pairs[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) pairs[i] = static_cast<double>(value[i]) + value[i + kLanes / 2];
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

// How one stored element type becomes floats, and floats it, rounded. `Stored` is the type in memory.
struct Float32 {
  using Stored = float;
  TQ_INLINE float rounded(float value) { return value; }
  TQ_INLINE void store_rounded(float* to, F32x16 value) { store(to, value); }
  TQ_INLINE float scalar(float stored) { return stored; }
  TQ_INLINE F32x16 vector(const float* from) { return load(from); }
};

struct BFloat16 {
  using Stored = uint16_t;
  TQ_INLINE uint16_t rounded(float value) { return bfloat16_from(value); }
  TQ_INLINE void store_rounded(uint16_t* to, F32x16 value) {
    const U32x16 bits = (U32x16)value;
    const U32x16 high = bits >> 16;
    const U32x16 up = (bits + 0x7fffu + (high & 1u)) >> 16;
    const I32x16 is_number = value == value;
    const U32x16 kept = (up & (U32x16)is_number) | ((high | 0x40u) & ~(U32x16)is_number);
    *reinterpret_cast<U16x16u*>(to) = __builtin_convertvector(kept, U16x16);
  }
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
  TQ_INLINE uint16_t rounded(float value) { return half_from(value); }
  TQ_INLINE void store_rounded(uint16_t* to, F32x16 value) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
#else
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = half_from(value[lane]);
#endif
  }
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
