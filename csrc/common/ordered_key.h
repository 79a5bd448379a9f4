// One 64-bit key for "(value descending, id ascending)": plain integer comparison orders candidates.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/platform.h"

namespace tq {

// The bits of a float made monotone: a < b exactly when ordered_bits(a) < ordered_bits(b), for all
// floats but NaN; -0 and +0 share one value.
TQ_HOST_DEVICE uint32_t ordered_bits(float value) {
  const float canonical = value + 0.0f;  // turns -0 into +0
  uint32_t bits;
  memcpy(&bits, &canonical, sizeof bits);
  return bits ^ ((bits & 0x80000000u) ? 0xffffffffu : 0x80000000u);
}

TQ_HOST_DEVICE float value_from_ordered_bits(uint32_t ordered) {
  const uint32_t bits = ordered ^ ((ordered & 0x80000000u) ? 0x80000000u : 0xffffffffu);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The larger key comes first: the larger value, and among equal values the lower id.
TQ_HOST_DEVICE uint64_t ordered_key(float value, uint32_t id) {
  return static_cast<uint64_t>(ordered_bits(value)) << 32 | static_cast<uint64_t>(~id);
}

TQ_HOST_DEVICE float value_of_key(uint64_t key) { return value_from_ordered_bits(static_cast<uint32_t>(key >> 32)); }

TQ_HOST_DEVICE uint32_t id_of_key(uint64_t key) { return ~static_cast<uint32_t>(key); }

}  // namespace tq
