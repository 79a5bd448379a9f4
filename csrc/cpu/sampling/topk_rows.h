// The vector part of finding the k largest of a row (topk.h). Compiled once for each ISA.
#pragma once

#include "cpu/sampling/logits_row.h"
#include "cpu/simd/isa.h"

namespace tq {

#define TQ_DECLARE(isa)                                                                                        \
  namespace isa {                                                                                              \
  /* A bound that k of `count` values reach, and more than k only where they tie with the k-th; `count` is a \
     multiple of sixteen. No value is NaN or above `most`, and k are known to reach `least`. */ \
  float bound_of_largest(const float* values, int64_t count, int64_t k, float least, float most);              \
  /* Keeps those of `count` values, a multiple of sixteen, that reach `least`; returns how many. */            \
  int64_t keep_at_least(const float* values, int64_t count, float least, float* kept);                         \
  /* Keys of the x / divisor of block b that are at least `least`: how many. `strand_peaks`: those that \
     reduce_blocks left of the block. `keys` has room for the block. */      \
  int64_t gather_from_block(                                                                                   \
      const LogitsRow& row, float divisor, int64_t b, const float* strand_peaks, float least, uint64_t* keys); \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
