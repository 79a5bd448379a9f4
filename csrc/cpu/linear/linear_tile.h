// A tile of a product: a few weight rows times a few rows of x, summed in registers. Included only by
// linear_rows.cpp.
#pragma once

#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

// A step of columns is kParts vectors, in an order of columns that weights and x share. `Stored` is the
// type of the weights in memory, `Packed` that of x once packed, kPartSize of them a part.
struct Float32Step {
  using Element = Float32;
  using Stored = float;
  using Packed = float;
  using Vector = Piece;
  static constexpr int kColumns = kLanes;
  static constexpr int kParts = kPieces;
  static constexpr int kPartSize = kWidth;
  TQ_INLINE Vector load_stored(const float* from, int part) { return load_packed(from + part * kWidth); }
  TQ_INLINE Vector load_packed(const float* from) { return *reinterpret_cast<const PieceU*>(from); }
  TQ_INLINE void store_packed(float* to, Vector part) { *reinterpret_cast<PieceU*>(to) = part; }
  TQ_INLINE Piece add_product(Piece sum, Vector a, Vector b) { return sum + a * b; }
};

struct Float16Step : Float32Step {
  using Element = Float16;
  using Stored = uint16_t;
  static constexpr int kColumns = 2 * kLanes;
  static constexpr int kParts = 2 * kPieces;
  TQ_INLINE Vector load_stored(const uint16_t* from, int part) { return Float16::load_piece(from + part * kWidth); }
};

// Even columns, then odd ones: one shift and one mask instead of two widenings.
struct BFloat16Step : Float32Step {
  using Element = BFloat16;
  using Stored = uint16_t;
  static constexpr int kColumns = 2 * kLanes;
  static constexpr int kParts = 2 * kPieces;
  TQ_INLINE Vector load_stored(const uint16_t* from, int part) {
    const PieceBits pairs = *reinterpret_cast<const PieceBitsU*>(from + part / 2 * 2 * kWidth);
    return part % 2 == 0 ? (Piece)(pairs << 16) : (Piece)(pairs & 0xffff0000u);
  }
};

#if defined(__AVX512F__)
// Sixteen pairs of columns at once, both products of a pair added to the lane's sum.
struct BFloat16DotStep {
  using Element = BFloat16;
  using Stored = uint16_t;
  using Packed = uint16_t;
  using Vector = PieceBits;
  static constexpr int kColumns = 2 * kLanes;
  static constexpr int kParts = 1;
  static constexpr int kPartSize = kColumns;
  TQ_INLINE Vector load_stored(const uint16_t* from, int) { return load_packed(from); }
  TQ_INLINE Vector load_packed(const uint16_t* from) { return *reinterpret_cast<const PieceBitsU*>(from); }
  TQ_INLINE void store_packed(uint16_t* to, Vector part) { *reinterpret_cast<PieceBitsU*>(to) = part; }
  TQ_INLINE Piece add_product(Piece sum, Vector a, Vector b) {
    // Written in assembly because the intrinsic needs flags under which the compiler may use the
    // instruction elsewhere.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};

// Lane i of the result: all lanes of v[i] added, paired as in fold_four.
TQ_INLINE Piece fold_sixteen(const Piece* v) {
  __m512 quads[4];
  for (int j = 0; j < 4; ++j) {
    __m512 pairs[2];
    for (int k = 0; k < 2; ++k) {
      const __m512 a = (__m512)v[4 * (2 * k) + j];
      const __m512 b = (__m512)v[4 * (2 * k + 1) + j];
      pairs[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    quads[j] =
        _mm512_add_ps(_mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88), _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xdd));
  }
  __m512 halves[2];
  for (int k = 0; k < 2; ++k) {
    const __m512d a = _mm512_castps_pd(quads[2 * k]);
    const __m512d b = _mm512_castps_pd(quads[2 * k + 1]);
    halves[k] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  return (Piece)_mm512_add_ps(
      _mm512_shuffle_ps(halves[0], halves[1], 0x88), _mm512_shuffle_ps(halves[0], halves[1], 0xdd));
}
#endif

// The upper half of the lanes added to the lower, until four are left. pieces: kStride apart.
template <int kStride>
TQ_INLINE F32x4 fold_to_four(const Piece* pieces) {
#if defined(__AVX2__)
  F32x8 eight;
#if defined(__AVX512F__)
  F32x8 halves[2];
  __builtin_memcpy(halves, pieces, sizeof halves);
  eight = halves[0] + halves[1];
#else
  eight = pieces[0] + pieces[kStride];
#endif
  F32x4 fours[2];
  __builtin_memcpy(fours, &eight, sizeof fours);
  return fours[0] + fours[1];
#else
  return (pieces[0] + pieces[2 * kStride]) + (pieces[kStride] + pieces[3 * kStride]);
#endif
}

// to[i] = all lanes of output i added, for four outputs.
template <int kStride>
TQ_INLINE void fold_four(const Piece* pieces, float* to) {
  F32x4 quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) quads[i] = fold_to_four<kStride>(pieces + i);
#if defined(__x86_64__)
  __m128 pairs[2];
  for (int k = 0; k < 2; ++k) {
    const __m128 a = (__m128)quads[2 * k];
    const __m128 b = (__m128)quads[2 * k + 1];
    pairs[k] = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  }
  const __m128 even = _mm_shuffle_ps(pairs[0], pairs[1], 0x88);
  _mm_storeu_ps(to, _mm_add_ps(even, _mm_shuffle_ps(pairs[0], pairs[1], 0xdd)));
#else
  for (int i = 0; i < 4; ++i) to[i] = (quads[i][0] + quads[i][2]) + (quads[i][1] + quads[i][3]);
#endif
}

// to[i] = all lanes of output i added, i in [0, kCount): a multiple of four. Piece p of output i is
// pieces[p * kCount + i].
template <int kCount>
TQ_INLINE void fold(const Piece* pieces, float* to) {
  int i = 0;
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (; i + 16 <= kCount; i += 16) *reinterpret_cast<PieceU*>(to + i) = fold_sixteen(pieces + i);
#endif
#pragma GCC unroll 8
  for (; i < kCount; i += 4) fold_four<kCount>(pieces + i, to + i);
}

// Keeps the compiler from repeating the load at each use of `value`, which would make the tile wait for the
// load ports.
template <typename Vector>
TQ_INLINE void load_once(Vector& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#else
  (void)value;
#endif
}

// Memory to fetch in the course of a product: `step` bytes for each weight row in each step of columns.
struct FetchedBeside {
  const char* from;
  int64_t step;
};

// sums[m * kWeights + r] = weights[r] times row m of x, over `count` columns, whole steps.
template <typename Step, int kWeights, int kRows>
TQ_INLINE void multiply_tile(
    const typename Step::Stored* const* weights, FetchedBeside fetched, const typename Step::Packed* x,
    int64_t x_stride, int64_t count, float* sums) {
  constexpr int kSums = (kWeights * kRows + 3) / 4 * 4;
  Piece lanes[kPieces * kSums];
#pragma GCC unroll 64
  for (int i = 0; i < kPieces * kSums; ++i) lanes[i] = Piece{};
  for (int64_t i = 0; i < count; i += Step::kColumns) {
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r, fetched.from += fetched.step) __builtin_prefetch(fetched.from, 0, 2);
#pragma GCC unroll 8
    for (int part = 0; part < Step::kParts; ++part) {
      Piece* const to = lanes + part % kPieces * kSums;
      typename Step::Vector left[kWeights];
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) left[r] = Step::load_stored(weights[r] + i, part);
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        typename Step::Vector right = Step::load_packed(x + m * x_stride + i + part * Step::kPartSize);
        load_once(right);
#pragma GCC unroll 4
        for (int r = 0; r < kWeights; ++r) {
          to[m * kWeights + r] = Step::add_product(to[m * kWeights + r], left[r], right);
        }
      }
    }
  }
  fold<kSums>(lanes, sums);
}

}  // namespace TQ_ISA
}  // namespace tq
