#include "cpu/simd/double_exp_rows.h"

#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

namespace {

// As many doubles as a register of the variant has: the compiler would take wider vectors apart.
constexpr int kDoubles = kWidth / 2;

typedef double F64s __attribute__((vector_size(8 * kDoubles)));
typedef int64_t I64s __attribute__((vector_size(8 * kDoubles)));
// For unaligned access through pointers.
typedef double F64su __attribute__((vector_size(8 * kDoubles), aligned(8)));

// a > b ? a : b in every lane: b where either is NaN.
TQ_INLINE F64s max_or_second(F64s a, F64s b) {
#if defined(__AVX512F__)
  return (F64s)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}

// Adding 1.5 * 2^52 rounds to an integer, which is then in the low bits of the double.
constexpr double kDoubleRoundingShift = 6755399441055744.0;

TQ_INLINE F64s to_integer(F64s x) { return (x + kDoubleRoundingShift) - kDoubleRoundingShift; }

#if !defined(__AVX512F__)
// 2^whole, whole an integer from -1022 to 1023.
TQ_INLINE F64s power_of_two(F64s whole) {
  return (F64s)(((I64s)(whole + kDoubleRoundingShift) << 52) + (int64_t{1023} << 52));
}
#endif

// x * 2^whole for an integer `whole` from -1080 to 0, where 2^whole may be subnormal.
TQ_INLINE F64s times_power_of_two(F64s x, F64s whole) {
#if defined(__AVX512F__)
  return (F64s)_mm512_scalef_pd((__m512d)x, (__m512d)whole);
#else
  const F64s half = to_integer(whole * 0.5);
  return x * power_of_two(half) * power_of_two(whole - half);
#endif
}

// exp(x) for x <= 0: 0 for -inf, NaN for NaN. x = whole * log(2) + rest, |rest| <= log(2) / 2, and
// exp(rest) = 1 + rest + rest^2 * a minimax polynomial, with a relative error of 4e-17 before rounding.
TQ_INLINE F64s exp_nonpositive(F64s x) {
  // exp(-746) rounds to 0.
  const F64s in_range = max_or_second(F64s{} - 746.0, x);
  const F64s whole = to_integer(in_range * 1.4426950408889634074);
  const F64s rest = (in_range - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
  F64s poly = rest * 2.510038549551032e-08 + 2.7620088445409746e-07;
  poly = poly * rest + 2.7557268459997064e-06;
  poly = poly * rest + 2.4801521295954376e-05;
  poly = poly * rest + 0.00019841269863053618;
  poly = poly * rest + 0.0013888888917213717;
  poly = poly * rest + 0.008333333333330062;
  poly = poly * rest + 0.04166666666662413;
  poly = poly * rest + 0.16666666666666669;
  poly = poly * rest + 0.5;
  return times_power_of_two((poly * (rest * rest) + rest) + 1.0, whole);
}

}  // namespace

void exp_in_place(double* x, int64_t count) {
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    F64su* const at = reinterpret_cast<F64su*>(x + i);
    *at = exp_nonpositive(*at);
  }
  F64s last = {};
  for (int64_t lane = 0; lane < count - i; ++lane) last[lane] = x[i + lane];
  last = exp_nonpositive(last);
  for (int64_t lane = 0; lane < count - i; ++lane) x[i + lane] = last[lane];
}

}  // namespace TQ_ISA
}  // namespace tq
