// Attention over a part of the keys: (out, lse), and the weights with which two parts merge.
//
// An empty part has lse = -inf, and +inf or NaN counts as empty too (some kernels write it for zero
// keys); two empty parts give (0, -inf).
#pragma once

#include <cmath>

#include "common/platform.h"

namespace tq {

struct AttentionMerge {
  float weight_a;
  float weight_b;
  float lse;
};

TQ_HOST_DEVICE float clean_attention_lse(float lse) {
  return lse < INFINITY ? lse : -INFINITY;  // false for NaN as well
}

// out = weight_a * out_a + weight_b * out_b. A weight of exactly 0 means: do not read that part.
TQ_HOST_DEVICE AttentionMerge merge_attention_lse(float lse_a, float lse_b) {
  const float a = clean_attention_lse(lse_a);
  const float b = clean_attention_lse(lse_b);
  const float peak = a > b ? a : b;
  if (peak == -INFINITY) return {0.0f, 0.0f, -INFINITY};
  const float mass_a = ::expf(a - peak);
  const float mass_b = ::expf(b - peak);
  const float mass = mass_a + mass_b;
  return {mass_a / mass, mass_b / mass, peak + ::logf(mass)};
}

}  // namespace tq
