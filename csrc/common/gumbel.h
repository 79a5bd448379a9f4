// Standard Gumbel noise: arg max over z of score(z) + g(z) is one draw from softmax(score).
#pragma once

#include <cmath>

#include "common/philox.h"

namespace tq {

// -log(-log u) in float64, u in (0, 1): finite for every uniform that philox.h can make.
TQ_HOST_DEVICE double gumbel_from_uniform(double uniform) { return -::log(-::log(uniform)); }

// The noise of one token id at one decoding step; keyed by the id, never by its rank.
TQ_HOST_DEVICE double choice_gumbel(int64_t seed, int64_t key, int64_t step, int64_t token_id) {
  return gumbel_from_uniform(philox_uniform(seed, kPurposeChoice, key, step, token_id));
}

}  // namespace tq
