// A register of doubles at a time: exponentials, logarithms, sums. Included only by *_rows.cpp (see isa.h).
//
// As many lanes as a register of the variant has: what a wider vector cannot do, select above all, the
// compiler does lane by lane. A lane's result never depends on what lies in the others.
#pragma once

#include "cpu/simd.h"

namespace tq {
namespace TQ_ISA {

constexpr int kWide = kWidth / 2;

typedef double F64s __attribute__((vector_size(8 * kWide)));
typedef int64_t I64s __attribute__((vector_size(8 * kWide)));
typedef uint64_t U64s __attribute__((vector_size(8 * kWide)));
typedef float F32s __attribute__((vector_size(4 * kWide)));
// For unaligned access through pointers.
typedef double F64su __attribute__((vector_size(8 * kWide), aligned(8)));
typedef int64_t I64su __attribute__((vector_size(8 * kWide), aligned(8)));
typedef float F32su __attribute__((vector_size(4 * kWide), aligned(4)));

// Subtracting 0 leaves every number as it is, so nothing is computed.
TQ_INLINE F64s broadcast_wide(double value) { return value - F64s{}; }

// a > b ? a : b in every lane: b where either is NaN.
TQ_INLINE F64s wide_max_or_second(F64s a, F64s b) {
#if defined(__AVX512F__)
  return (F64s)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}

TQ_INLINE double reduce_max(F64s value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_pd((__m512d)value);
#else
  double best = value[0];
  for (int lane = 1; lane < kWide; ++lane) best = value[lane] > best ? value[lane] : best;
  return best;
#endif
}

TQ_INLINE double reduce_sum(F64s value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)value);
#else
  double sum = value[0];
  for (int lane = 1; lane < kWide; ++lane) sum += value[lane];
  return sum;
#endif
}

TQ_INLINE F64s square_root(F64s x) {
#if defined(__AVX512F__)
  return (F64s)_mm512_sqrt_pd((__m512d)x);
#else
  for (int lane = 0; lane < kWide; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
#endif
}

// One bit for each lane where they are equal.
TQ_INLINE uint32_t mask_equal(F64s a, F64s b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_EQ_OQ);
#else
  const I64s equal = a == b;
  uint32_t mask = 0;
  for (int lane = 0; lane < kWide; ++lane) mask |= static_cast<uint32_t>(equal[lane] != 0) << lane;
  return mask;
#endif
}

// The first `count` numbers in as many lanes, 0 in the others, whose place in memory is not looked at.
TQ_INLINE F64s load_doubles(const double* from, int64_t count) {
#if defined(__AVX512F__)
  return (F64s)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), from);
#else
  if (count == kWide) return *reinterpret_cast<const F64su*>(from);
  F64s lanes = {};
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return lanes;
#endif
}

TQ_INLINE F64s load_doubles(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return (F64s)_mm512_cvtps_pd(_mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1u), from));
#else
  if (count == kWide) return __builtin_convertvector(*reinterpret_cast<const F32su*>(from), F64s);
  F64s lanes = {};
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return lanes;
#endif
}

TQ_INLINE I64s load_integers(const int64_t* from, int64_t count) {
#if defined(__AVX512F__)
  return (I64s)_mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << count) - 1u), from);
#else
  if (count == kWide) return *reinterpret_cast<const I64su*>(from);
  I64s lanes = {};
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return lanes;
#endif
}

// The first `count` lanes, rounded.
TQ_INLINE void store_floats(float* to, F64s value, int64_t count) {
  const F32s floats = __builtin_convertvector(value, F32s);
#if defined(__AVX512F__)
  _mm256_mask_storeu_ps(to, static_cast<__mmask8>((1u << count) - 1u), (__m256)floats);
#else
  if (count == kWide) {
    *reinterpret_cast<F32su*>(to) = floats;
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = floats[lane];
#endif
}

// Adding 1.5 * 2^52 rounds to an integer, which is then in the low bits of the double.
constexpr double kWideRoundingShift = 6755399441055744.0;

TQ_INLINE F64s rounded(F64s x) { return (x + kWideRoundingShift) - kWideRoundingShift; }

#if !defined(__AVX512F__)
// 2^whole, whole an integer from -1022 to 1023.
TQ_INLINE F64s power_of_two(F64s whole) {
  return (F64s)(((I64s)(whole + kWideRoundingShift) << 52) + (int64_t{1023} << 52));
}
#endif

// x * 2^whole, whole an integer from -1080 to 1040: also where 2^whole itself is not a normal number.
TQ_INLINE F64s times_power_of_two(F64s x, F64s whole) {
#if defined(__AVX512F__)
  return (F64s)_mm512_scalef_pd((__m512d)x, (__m512d)whole);
#else
  const F64s half = rounded(whole * 0.5);
  return x * power_of_two(half) * power_of_two(whole - half);
#endif
}

// x = whole * log(2) + rest, |rest| <= log(2) / 2; and exp(rest) - 1, with a relative error of 4e-17
// before rounding (rest + rest^2 * a minimax polynomial).
struct SplitExponent {
  F64s whole;
  F64s rest_expm1;
};

TQ_INLINE SplitExponent split_exponent(F64s x) {
  const F64s whole = rounded(x * 1.4426950408889634074);
  const F64s rest = (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
  F64s poly = rest * 2.510038549551032e-08 + 2.7620088445409746e-07;
  poly = poly * rest + 2.7557268459997064e-06;
  poly = poly * rest + 2.4801521295954376e-05;
  poly = poly * rest + 0.00019841269863053618;
  poly = poly * rest + 0.0013888888917213717;
  poly = poly * rest + 0.008333333333330062;
  poly = poly * rest + 0.04166666666662413;
  poly = poly * rest + 0.16666666666666669;
  poly = poly * rest + 0.5;
  return {whole, poly * (rest * rest) + rest};
}

// exp(x) for x <= 0, within 2 units in the last place: 0 for -inf, NaN for NaN.
TQ_INLINE F64s exp_nonpositive(F64s x) {
  // exp(-746) rounds to 0.
  const SplitExponent split = split_exponent(wide_max_or_second(broadcast_wide(-746.0), x));
  return times_power_of_two(split.rest_expm1 + 1.0, split.whole);
}

// exp(x) - 1, within 4 units in the last place; NaN for NaN.
TQ_INLINE F64s expm1_of(F64s x) {
  const F64s lowest = broadcast_wide(-746.0);
  const F64s highest = broadcast_wide(710.0);
  const F64s above = wide_max_or_second(lowest, x);
  const SplitExponent split = split_exponent(above > highest ? highest : above);
  // Half of it, so that 2^1024 is not met before the end.
  const F64s whole = split.whole - 1.0;
  const F64s power = times_power_of_two(broadcast_wide(1.0), whole);
  return 2.0 * (times_power_of_two(split.rest_expm1, whole) + (power - 0.5));
}

// log(x) of a normal number above 0, within 1 unit in the last place.
TQ_INLINE F64s log_of_normal(F64s x) {
  constexpr uint64_t kBitsOfRootHalf = 0x3fe6a09e667f3bcdull;
  constexpr uint64_t kOne = 0x3ff0000000000000ull;
  // x = 2^(biased - 1023) * (1 + f), 1 + f between sqrt(1/2) and sqrt(2).
  const U64s biased = ((U64s)x + (kOne - kBitsOfRootHalf)) >> 52;
  const F64s f = (F64s)((U64s)x - (biased << 52) + kOne) - 1.0;
  // Or-ing a small integer into the bits of 2^52 adds it.
  const F64s exponent = (F64s)(biased | 0x4330000000000000ull) - (4503599627370496.0 + 1023.0);
  // With s = f / (2 + f): log(1 + f) = 2 atanh(s), an odd polynomial (fdlibm, e_log.c).
  const F64s s = f / (f + 2.0);
  const F64s z = s * s;
  F64s poly = z * 1.479819860511658591e-01 + 1.531383769920937332e-01;
  poly = poly * z + 1.818357216161805012e-01;
  poly = poly * z + 2.222219843214978396e-01;
  poly = poly * z + 2.857142874366239149e-01;
  poly = poly * z + 3.999999999940941908e-01;
  poly = poly * z + 6.666666666666735130e-01;
  const F64s half_square = f * f * 0.5;
  const F64s tail = s * (half_square + poly * z) + exponent * 1.90821492927058770002e-10;
  return exponent * 6.93147180369123816490e-01 - ((half_square - tail) - f);
}

}  // namespace TQ_ISA
}  // namespace tq
