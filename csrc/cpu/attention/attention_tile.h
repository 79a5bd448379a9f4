// The products of attention: tiles summed in registers, of floats or of pairs of bf16 numbers. Included
// only by attention_rows.cpp.
#pragma once

#include "cpu/attention/attention_rows.h"
#include "cpu/simd/floats.h"
#include "cpu/simd/transpose.h"

namespace tq {
namespace TQ_ISA {

// A tile of kTileRows x kTileVectors accumulators, its operands beside it, fills the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 1;
#else
constexpr int kTileRows = 2;
constexpr int kTileVectors = 1;
#endif

// Multiplication of two words of 32 bits, one from each operand, and the packing of a block of weights into
// words.
struct FloatWords {
  TQ_INLINE F32x16 add_product(F32x16 sum, F32x16 a, F32x16 b) { return sum + a * b; }
  TQ_INLINE void pack_weights(float*) {}
};

#if defined(__AVX512F__)
// Each word holds two bf16 numbers, and both products are added; numbers below 2^-126 count as 0.
struct PairWords {
  TQ_INLINE F32x16 add_product(F32x16 sum, F32x16 a, F32x16 b) {
    // Written in assembly because the intrinsic needs flags under which the compiler may use the
    // instruction elsewhere.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  // Rounds to nearest even, into the first half of the room.
  TQ_INLINE void pack_weights(float* weights) {
    for (int64_t i = 0; i < kKeysPerBlock; i += 2 * kLanes) {
      const F32x16 first = load(weights + i);
      const F32x16 second = load(weights + i + kLanes);
      F32x16 pairs;
      asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(first), "v"(second));
      store(weights + i / 2, pairs);
    }
  }
};
#endif

// c [rows, 16 * vectors] = (c * shrinks) + a [rows, depth] @ b [depth, 16 * vectors], strides and depth
// in words; without shrinks, c holds nothing yet.
struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t depth;
  float* c;
  int64_t c_stride;
  const float* shrinks;
};

template <typename Words, int kRows, int kVectors, bool kAccumulate>
TQ_INLINE void multiply_tile(const Product& x, int64_t row, int64_t column, ReadingPace& pace) {
  const float* const a = x.a + row * x.a_stride;
  const float* const b = x.b + column;
  float* const c = x.c + row * x.c_stride + column;
  F32x16 sums[kRows][kVectors] = {};
  for (int r = 0; kAccumulate && r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(c + r * x.c_stride + v * kLanes) * x.shrinks[row + r];
  }
  for (int64_t i = 0; i < x.depth; ++i) {
    pace.step(kRows * kVectors);
    F32x16 right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + i * x.b_stride + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const F32x16 left = broadcast(a[r * x.a_stride + i]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Words::add_product(sums[r][v], left, right[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * x.c_stride + v * kLanes, sums[r][v]);
  }
}

template <typename Words, int kVectors, bool kAccumulate>
static void multiply_columns(const Product& x, int64_t rows, int64_t column, ReadingPace& pace) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    multiply_tile<Words, kTileRows, kVectors, kAccumulate>(x, row, column, pace);
  }
  for (; row + 4 <= rows; row += 4) multiply_tile<Words, 4, kVectors, kAccumulate>(x, row, column, pace);
  for (; row + 2 <= rows; row += 2) multiply_tile<Words, 2, kVectors, kAccumulate>(x, row, column, pace);
  if (row < rows) multiply_tile<Words, 1, kVectors, kAccumulate>(x, row, column, pace);
}

// `width` is a multiple of 16.
template <typename Words, bool kAccumulate>
static void multiply(const Product& x, int64_t rows, int64_t width, ReadingPace& pace) {
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= width; column += kTileVectors * kLanes) {
    multiply_columns<Words, kTileVectors, kAccumulate>(x, rows, column, pace);
  }
  for (; column < width; column += kLanes) multiply_columns<Words, 1, kAccumulate>(x, rows, column, pace);
}

#if defined(__AVX512F__)
// bf16 keys of a block with the positions as columns, [head_size / 2, 64] pairs; zero from `count` on to
// the end of a vector. `room` is for sixteen keys. head_size is a multiple of 32.
static void transpose_key_pairs(
    const char* keys, int64_t stride, int64_t count, int64_t head_size, float* room, float* to) {
  const int64_t bytes = 2 * head_size;
  for (int64_t j = 0; j < count; j += kLanes) {
    const char* from = keys + j * stride * 2;
    int64_t from_stride = stride * 2;
    if (count - j < kLanes) {
      from = reinterpret_cast<const char*>(room);
      from_stride = bytes;
      for (int64_t key = 0; key < kLanes; ++key) {
        char* const row = reinterpret_cast<char*>(room) + key * bytes;
        if (j + key < count) __builtin_memcpy(row, keys + (j + key) * stride * 2, bytes);
        if (j + key >= count) __builtin_memset(row, 0, bytes);
      }
    }
    for (int64_t i = 0; i < bytes; i += 64) {
      transpose_16x16_words(from + i, from_stride, to + i / 4 * kKeysPerBlock + j, kKeysPerBlock);
    }
  }
}

// bf16 values of a block, two positions in each word, [(count + 1) / 2, head_size]; zero beside an odd
// last one. head_size is a multiple of 32.
static void pair_values(const char* values, int64_t stride, int64_t count, int64_t head_size, float* to) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kOrder);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t j = 0; j < count; j += 2, to += head_size) {
    const char* const first = values + j * stride * 2;
    for (int64_t i = 0; i < head_size; i += 2 * kLanes) {
      const __m512i a = _mm512_loadu_si512(first + i * 2);
      const __m512i b = j + 1 < count ? _mm512_loadu_si512(first + (stride + i) * 2) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + i + kLanes, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}
#endif

}  // namespace TQ_ISA
}  // namespace tq
