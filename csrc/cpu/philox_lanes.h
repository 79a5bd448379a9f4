// common/philox.h for some draws at a time. Included only by *_rows.cpp (see isa.h).
#pragma once

#include "common/philox.h"
#include "cpu/double_lanes.h"

namespace tq {
namespace TQ_ISA {

// The low words' products, 64 bits each; the high words play no part.
TQ_INLINE U64s multiply_low_words(U64s a, uint32_t b) {
  // The compiler does not see that 32 bits are enough.
#if defined(__AVX512F__)
  return (U64s)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (U64s)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (U64s)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffull) * b;
#endif
}

// What the draws of a prompt share: the key of every round, and three words of the counter.
struct PhiloxStream {
  uint64_t round_key0[10];
  uint64_t round_key1[10];
  uint64_t word1, word2, word3;
};

TQ_INLINE PhiloxStream philox_stream(int64_t seed, uint32_t purpose, int64_t key, int64_t step) {
  const uint64_t seed_bits = static_cast<uint64_t>(seed);
  const uint64_t key_bits = static_cast<uint64_t>(key);
  PhiloxStream stream;
  uint32_t key0 = static_cast<uint32_t>(seed_bits);
  uint32_t key1 = static_cast<uint32_t>(seed_bits >> 32) ^ purpose;
  for (int round = 0; round < 10; ++round) {
    stream.round_key0[round] = key0;
    stream.round_key1[round] = key1;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  stream.word1 = static_cast<uint32_t>(step);
  stream.word2 = static_cast<uint32_t>(key_bits);
  stream.word3 = key_bits >> 32;
  return stream;
}

// philox_uniform of these indices: the very same numbers.
TQ_INLINE F64s philox_uniforms(const PhiloxStream& stream, I64s indices) {
  // Only the low word of each lane is meant: the rounds leave the high ones full of anything.
  U64s w0 = (U64s)indices;
  U64s w1 = U64s{} + stream.word1;
  U64s w2 = U64s{} + stream.word2;
  U64s w3 = U64s{} + stream.word3;
  for (int round = 0; round < 10; ++round) {
    const U64s a = multiply_low_words(w0, 0xD2511F53u);
    const U64s b = multiply_low_words(w2, 0xCD9E8D57u);
    w0 = (b >> 32) ^ w1 ^ stream.round_key0[round];
    w1 = b;
    w2 = (a >> 32) ^ w3 ^ stream.round_key1[round];
    w3 = a;
  }
  const U64s bits = ((w0 & 0xffffffffull) | w1 << 32) >> 11;
  // Exact, by halves: or-ing a small integer into the bits of 2^52, of 2^84, adds it or 2^32 times it.
  const F64s low = (F64s)((bits & 0xffffffffull) | 0x4330000000000000ull) - 0x1p52;
  const F64s high = (F64s)((bits >> 32) | 0x4530000000000000ull) - 0x1p84;
  const F64s u = ((high + low) + 0.5) * 0x1p-53;
  return u < kLargestUniform ? u : broadcast_wide(kLargestUniform);
}

}  // namespace TQ_ISA
}  // namespace tq
