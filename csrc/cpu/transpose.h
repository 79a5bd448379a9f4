// Sixteen vectors of sixteen floats, crosswise. Included only by *_rows.cpp (see isa.h).
#pragma once

#include "cpu/simd.h"

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

// As transpose_16x16, of any words of 32 bits, on any boundary; `stride` is in bytes.
TQ_INLINE void transpose_16x16_words(const char* from, int64_t stride, float* to, int64_t to_stride) {
  __m512 r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * stride);
  transpose_in_registers(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * to_stride, r[i]);
}
#endif

// to[i * to_stride + j] = from[j * stride + i] for i and j below 16.
TQ_INLINE void transpose_16x16(const float* from, int64_t stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  transpose_16x16_words(reinterpret_cast<const char*>(from), stride * 4, to, to_stride);
#else
  for (int j = 0; j < 16; ++j) {
    for (int i = 0; i < 16; ++i) to[i * to_stride + j] = from[j * stride + i];
  }
#endif
}

struct AddLanes {
#if defined(__AVX512F__)
  TQ_INLINE __m512 both(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
#else
  TQ_INLINE float all(F32x16 x) { return add_lanes(x); }
#endif
};

struct MaxLanes {
#if defined(__AVX512F__)
  TQ_INLINE __m512 both(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
#else
  TQ_INLINE float all(F32x16 x) { return reduce_max(x); }
#endif
};

template <typename Reduce>
TQ_INLINE F32x16 reduce_across(const F32x16 (&x)[kLanes]) {
#if defined(__AVX512F__)
  // Four rounds, each taking the halves of two vectors into one: of quads, pairs, numbers.
  __m512 r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = (__m512)x[i];
  for (int i = 0; i < 8; ++i) {
    r[i] = Reduce::both(_mm512_shuffle_f32x4(r[i], r[i + 8], 0x44), _mm512_shuffle_f32x4(r[i], r[i + 8], 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = Reduce::both(_mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd));
  }
  // r[i], 128 bits at a time: what is left of vectors i, i + 8, i + 4, i + 12.
  const __m512 a = Reduce::both(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
  const __m512 b = Reduce::both(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
  const __m512 mixed = Reduce::both(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  return (F32x16)_mm512_shuffle_f32x4(mixed, mixed, 0xd8);
#else
  F32x16 out;
  for (int i = 0; i < kLanes; ++i) out[i] = Reduce::all(x[i]);
  return out;
#endif
}

// Lane i: the sum, the largest of the lanes of x[i]; no NaN among those compared.
TQ_INLINE F32x16 add_across(const F32x16 (&x)[kLanes]) { return reduce_across<AddLanes>(x); }
TQ_INLINE F32x16 max_across(const F32x16 (&x)[kLanes]) { return reduce_across<MaxLanes>(x); }

}  // namespace TQ_ISA
}  // namespace tq
