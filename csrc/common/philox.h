// Philox4x32-10, the counter-based generator of every random draw in the package.
//
// Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
// One draw is named by (seed, purpose, key, step, index) and depends on nothing else: not on the row
// or slot that it is computed in. Known answer: key 0, counter 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
#pragma once

#include <cstdint>

#include "common/platform.h"

namespace tq {

// The purpose of a draw separates streams that share everything else.
constexpr uint32_t kPurposeRollout = 1;
constexpr uint32_t kPurposeChoice = 2;

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

TQ_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * counter.w0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * counter.w2;
    counter = PhiloxWords{
        static_cast<uint32_t>(b >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

TQ_HOST_DEVICE PhiloxWords philox_draw(int64_t seed, uint32_t purpose, int64_t key, int64_t step, int64_t index) {
  const uint64_t seed_bits = static_cast<uint64_t>(seed);
  const uint64_t key_bits = static_cast<uint64_t>(key);
  const PhiloxWords counter{
      static_cast<uint32_t>(index), static_cast<uint32_t>(step), static_cast<uint32_t>(key_bits),
      static_cast<uint32_t>(key_bits >> 32)};
  return philox4x32(counter, static_cast<uint32_t>(seed_bits), static_cast<uint32_t>(seed_bits >> 32) ^ purpose);
}

constexpr double kLargestUniform = 1.0 - 0x1p-53;

// 53 random bits, centred in their cells: open interval (0, 1), so neither log(u) nor log(1 - u) is infinite.
// Above 1/2 a cell's centre needs a 54th bit and rounds to an edge; the last one would round to 1.
TQ_HOST_DEVICE double uniform_from_words(PhiloxWords words) {
  const uint64_t bits = static_cast<uint64_t>(words.w0) | static_cast<uint64_t>(words.w1) << 32;
  const double u = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
  return u < kLargestUniform ? u : kLargestUniform;
}

TQ_HOST_DEVICE double philox_uniform(int64_t seed, uint32_t purpose, int64_t key, int64_t step, int64_t index) {
  return uniform_from_words(philox_draw(seed, purpose, key, step, index));
}

}  // namespace tq
