// exp and tanh of sixteen floats at a time. Included only by *_rows.cpp (see isa.h).
#pragma once

#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

// Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits of the float.
constexpr float kRoundingShift = 12582912.0f;

// 2^whole * 2^rest, whole = shifted - kRoundingShift from -126 to 0 and |rest| <= 1/2: the second by a
// polynomial fitted to a relative error of 9e-8, exactly 1 at 0.
TQ_INLINE F32x16 exp2_of(F32x16 shifted, F32x16 rest) {
  F32x16 poly = rest * 1.3264727e-3f + 9.6715128e-3f;
  poly = poly * rest + 5.5507337e-2f;
  poly = poly * rest + 2.4022242e-1f;
  poly = poly * rest + 6.9314698e-1f;
  poly = poly * rest + 1.0f;
  return (F32x16)((U32x16)poly + ((U32x16)shifted << 23));
}

// exp(x) for x in [-87.3, 0], within 2 units in the last place.
TQ_INLINE F32x16 exp_in_range(F32x16 x) {
  const F32x16 log2_e = broadcast(1.44269504088896341f);
  const F32x16 shifted = x * log2_e + broadcast(kRoundingShift);
  return exp2_of(shifted, x * log2_e - (shifted - broadcast(kRoundingShift)));
}

// 2^x for x <= 0; exactly 0 below 2^-126, so for -inf too. NaN stays NaN.
TQ_INLINE F32x16 exp2_nonpositive(F32x16 x) {
  const F32x16 lowest = broadcast(-126.0f);
  const F32x16 in_range = max_or_second(lowest, x);
  const F32x16 shifted = in_range + broadcast(kRoundingShift);
  const F32x16 result = exp2_of(shifted, in_range - (shifted - broadcast(kRoundingShift)));
#if defined(__AVX512F__)
  const __mmask16 is_kept = _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ);
  return (F32x16)_mm512_maskz_mov_ps(is_kept, (__m512)result);
#else
  return (F32x16)((I32x16)result & ~(I32x16)(x < lowest));
#endif
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

// tanh within 3 units in the last place: a polynomial near 0, where the quotient would cancel, and
// (1 - e) / (1 + e) with e = exp(-2 |x|) elsewhere. NaN stays NaN.
TQ_INLINE F32x16 tanh_of(F32x16 x) {
  const I32x16 sign = (I32x16)x & static_cast<int32_t>(0x80000000u);
  const F32x16 size = (F32x16)((I32x16)x & 0x7fffffff);
  const F32x16 square = x * x;
  F32x16 poly = square * -5.70498872745e-3f + 2.06390887954e-2f;
  poly = poly * square - 5.37397155531e-2f;
  poly = poly * square + 1.33314422036e-1f;
  poly = poly * square - 3.33332819422e-1f;
  const F32x16 small = poly * square * x + x;
  const F32x16 e = exp_nonpositive(size * -2.0f);
  const F32x16 large = (F32x16)((I32x16)((1.0f - e) / (1.0f + e)) | sign);
  const F32x16 result = select(size < 0.625f, small, large);
  return select(x == x, result, x);
}

}  // namespace TQ_ISA
}  // namespace tq
