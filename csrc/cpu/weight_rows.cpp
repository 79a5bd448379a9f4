#include "cpu/weight_rows.h"

#include "cpu/simd.h"

namespace tq {
namespace TQ_ISA {

namespace {

constexpr int kWide = 8;

typedef double F64x8 __attribute__((vector_size(64)));
typedef int64_t I64x8 __attribute__((vector_size(64)));
typedef double F64x8u __attribute__((vector_size(64), aligned(8)));

// 2^whole * exp(rest), |rest| <= log(2) / 2, the second by its series: the first term left out is 4e-18.
TQ_INLINE F64x8 exp_in_normal_range(F64x8 x) {
  // Adding 1.5 * 2^52 rounds to an integer, which is then in the low bits of the double.
  const double magic = 6755399441055744.0;
  const F64x8 shifted = x * 1.4426950408889634074 + magic;
  const F64x8 whole = shifted - magic;
  const F64x8 rest = (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
  constexpr double kInverseFactorials[] = {
      1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
      1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5,
      1.0,                1.0};
  F64x8 sum = F64x8{} + kInverseFactorials[0];
  for (int i = 1; i < 14; ++i) sum = sum * rest + kInverseFactorials[i];
  return (F64x8)((I64x8)sum + ((I64x8)shifted << 52));
}

}  // namespace

void exp_in_place(double* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kWide) {
    const int64_t left = count - i < kWide ? count - i : kWide;
    bool is_normal = left == kWide;
    for (int64_t lane = 0; lane < left; ++lane) is_normal &= x[i + lane] >= -708.0 && x[i + lane] <= 709.0;
    if (is_normal) {
      const F64x8 value = *reinterpret_cast<const F64x8u*>(x + i);
      *reinterpret_cast<F64x8u*>(x + i) = exp_in_normal_range(value);
      continue;
    }
    // What is not a number, infinite, subnormal or left over.
    for (int64_t lane = 0; lane < left; ++lane) x[i + lane] = __builtin_exp(x[i + lane]);
  }
}

}  // namespace TQ_ISA
}  // namespace tq
