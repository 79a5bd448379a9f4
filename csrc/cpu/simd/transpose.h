// Sixteen vectors of sixteen floats, crosswise. Included only by *_rows.cpp (see isa.h).
#pragma once

#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

#if defined(__AVX512F__)
// Word i of r[j] becomes word j of r[i].
TQ_INLINE void transpose_in_registers(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(t[i + half]);
      const __m512d b = _mm512_castps_pd(t[i + half + 2]);
      r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // r[4 * q + c]: rows 4q to 4q + 3, columns c, c + 4, c + 8, c + 12, one in each 128-bit part.
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 high_odd = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    r[c] = _mm512_shuffle_f32x4(low, high, 0x88);
    r[c + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
    r[c + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    r[c + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
}

// Does as transpose_16x16, for any words of 32 bits on any boundary; `stride` is in bytes.
TQ_INLINE void transpose_16x16_words(const char* from, int64_t stride, float* to, int64_t to_stride) {
  __m512 r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * stride);
  transpose_in_registers(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * to_stride, r[i]);
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// to[i * to_stride + j] = from[j * stride + i] for i and j below 8.
TQ_INLINE void transpose_8x8(const float* from, int64_t stride, float* to, int64_t to_stride) {
  // Loads the halves of rows j and j + 4 into one register, so that no word has to cross from one half to
  // the other.
  for (int half = 0; half < 8; half += 4) {
    __m256 r[4];
    for (int j = 0; j < 4; ++j) {
      const float* const low = from + j * stride + half;
      r[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(low + 4 * stride), 1);
    }
    const __m256 a = _mm256_unpacklo_ps(r[0], r[1]);
    const __m256 b = _mm256_unpackhi_ps(r[0], r[1]);
    const __m256 c = _mm256_unpacklo_ps(r[2], r[3]);
    const __m256 d = _mm256_unpackhi_ps(r[2], r[3]);
    _mm256_storeu_ps(to + half * to_stride, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(to + (half + 1) * to_stride, _mm256_shuffle_ps(a, c, 0xee));
    _mm256_storeu_ps(to + (half + 2) * to_stride, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(to + (half + 3) * to_stride, _mm256_shuffle_ps(b, d, 0xee));
  }
}
#endif

// to[i * to_stride + j] = from[j * stride + i] for i and j below 16.
TQ_INLINE void transpose_16x16(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  transpose_16x16_words(reinterpret_cast<const char*>(from), stride * 4, to, to_stride);
#elif defined(__AVX2__)
  for (int j = 0; j < 16; j += 8) {
    for (int i = 0; i < 16; i += 8) transpose_8x8(from + j * stride + i, stride, to + i * to_stride + j, to_stride);
  }
#elif defined(__x86_64__)
  for (int j = 0; j < 16; j += 4) {
    for (int i = 0; i < 16; i += 4) {
      __m128 r[4];
      for (int row = 0; row < 4; ++row) r[row] = _mm_loadu_ps(from + (j + row) * stride + i);
      _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
      for (int row = 0; row < 4; ++row) _mm_storeu_ps(to + (i + row) * to_stride + j, r[row]);
    }
  }
#else
  for (int j = 0; j < 16; ++j) {
    for (int i = 0; i < 16; ++i) to[i * to_stride + j] = from[j * stride + i];
  }
#endif
}

#if !defined(__AVX512F__)
// Lane i of the result: all lanes of x[i], combined.
template <typename Reduce>
TQ_INLINE F32x4 reduce_four(const F32x16* x) {
  F32x4 fours[4];
  for (int i = 0; i < 4; ++i) fours[i] = fold_lanes<Reduce>(x[i]);
#if defined(__x86_64__)
  __m128 pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m128 a = (__m128)fours[2 * i];
    const __m128 b = (__m128)fours[2 * i + 1];
    pairs[i] = (__m128)Reduce::both((F32x4)_mm_movelh_ps(a, b), (F32x4)_mm_movehl_ps(b, a));
  }
  return Reduce::both((F32x4)_mm_shuffle_ps(pairs[0], pairs[1], 0x88), (F32x4)_mm_shuffle_ps(pairs[0], pairs[1], 0xdd));
#else
  F32x4 columns[4];
  for (int i = 0; i < 4; ++i) columns[i] = F32x4{fours[0][i], fours[1][i], fours[2][i], fours[3][i]};
  return Reduce::both(Reduce::both(columns[0], columns[2]), Reduce::both(columns[1], columns[3]));
#endif
}
#endif

template <typename Reduce>
TQ_INLINE F32x16 reduce_across(const F32x16 (&x)[kLanes]) {
#if defined(__AVX512F__)
  // In each of four rounds, two vectors become one: by halves, quads, pairs, numbers.
  const auto both = [](__m512 a, __m512 b) TQ_INLINED { return (__m512)Reduce::both((F32x16)a, (F32x16)b); };
  __m512 r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = (__m512)x[i];
  for (int i = 0; i < 8; ++i) {
    r[i] = both(_mm512_shuffle_f32x4(r[i], r[i + 8], 0x44), _mm512_shuffle_f32x4(r[i], r[i + 8], 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = both(_mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd));
  }
  // Each 128 bits of r[i] hold what is left of vectors i, i + 8, i + 4, i + 12.
  const __m512 a = both(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
  const __m512 b = both(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
  const __m512 mixed = both(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  return (F32x16)_mm512_shuffle_f32x4(mixed, mixed, 0xd8);
#else
  F32x4 out[kLanes / 4];
  for (int i = 0; i < kLanes / 4; ++i) out[i] = reduce_four<Reduce>(x + 4 * i);
  return load(reinterpret_cast<const float*>(out));
#endif
}

// Lane i of the result: the sum, or the largest, of the lanes of x[i]. No NaN may be among those compared.
TQ_INLINE F32x16 add_across(const F32x16 (&x)[kLanes]) { return reduce_across<AddLanes>(x); }
TQ_INLINE F32x16 max_across(const F32x16 (&x)[kLanes]) { return reduce_across<MaxLanes>(x); }

}  // namespace TQ_ISA
}  // namespace tq
