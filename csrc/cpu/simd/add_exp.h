// Sums of exponentials, four vectors at a time: step by step, so that the chains of operations of the four
// overlap. Included only by *_rows.cpp (see isa.h).
#pragma once

#include "cpu/simd/exp_and_tanh.h"

namespace tq {
namespace TQ_ISA {

constexpr int kParts = 4;

#if defined(__AVX512F__)

// The bits of 2^(i / 32), minus i << 18, which add_exp adds together with the exponent.
alignas(64) constexpr uint32_t kPowers[32] = {
    0x3f800000u, 0x3f7ecd87u, 0x3f7daac3u, 0x3f7c980fu, 0x3f7b95c2u, 0x3f7aa43au, 0x3f79c3d3u, 0x3f78f4f0u,
    0x3f7837f0u, 0x3f778d3au, 0x3f76f532u, 0x3f767043u, 0x3f75fed7u, 0x3f75a15bu, 0x3f75583fu, 0x3f7523f6u,
    0x3f7504f3u, 0x3f74fbafu, 0x3f7508a4u, 0x3f752c4du, 0x3f75672au, 0x3f75b9beu, 0x3f76248cu, 0x3f76a81eu,
    0x3f7744fdu, 0x3f77fbb8u, 0x3f78ccdfu, 0x3f79b907u, 0x3f7ac0c7u, 0x3f7be4bau, 0x3f7d257du, 0x3f7e83b3u,
};

// sums[part] += exp(x[part]) for x <= 0, within 2 units in the last place; 1.6e-38 for what lies below
// -87, for -inf and for NaN. exp(x) = 2^(n / 32) * 2^rest, |rest| <= 1/64: a table of 32 numbers lies in
// two registers and leaves a polynomial of degree 2 (relative error 5e-8) where exp_in_range has 5.
TQ_INLINE void add_exp(F32x16 (&x)[kParts], F32x16 (&sums)[kParts]) {
  const F32x16 scale = broadcast(32.0f * 1.44269504088896341f);
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits of the float.
  const F32x16 magic = broadcast(12582912.0f);
  const __m512i low_powers = _mm512_load_si512(kPowers);
  const __m512i high_powers = _mm512_load_si512(kPowers + 16);
  F32x16 shifted[kParts], rest[kParts], poly[kParts];
  for (int part = 0; part < kParts; ++part) x[part] = max_or_second(x[part], broadcast(kLowestExponent));
  for (int part = 0; part < kParts; ++part) shifted[part] = x[part] * scale + magic;
  for (int part = 0; part < kParts; ++part) rest[part] = shifted[part] - magic;
  for (int part = 0; part < kParts; ++part) rest[part] = x[part] * scale - rest[part];
  for (int part = 0; part < kParts; ++part) poly[part] = rest[part] * 2.3459245e-4f + 2.1661166e-2f;
  for (int part = 0; part < kParts; ++part) poly[part] = poly[part] * rest[part] + 1.0f;
  for (int part = 0; part < kParts; ++part) {
    const __m512i n = (__m512i)shifted[part];
    const __m512i power = _mm512_permutex2var_epi32(low_powers, n, high_powers);
    sums[part] += poly[part] * (F32x16)_mm512_add_epi32(power, _mm512_slli_epi32(n, 18));
  }
}

#else

TQ_INLINE void add_exp(F32x16 (&x)[kParts], F32x16 (&sums)[kParts]) {
  for (int part = 0; part < kParts; ++part) sums[part] += exp_for_sum(x[part]);
}

#endif

}  // namespace TQ_ISA
}  // namespace tq
