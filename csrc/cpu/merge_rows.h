// The vector part of merge_attention_states. One copy for each ISA.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/row_types.h"

namespace tq {

// Two attention states of the same rows, dense: out [rows, size] of `type`, lse [rows].
struct MergeJob {
  const void* out_a;
  const float* lse_a;
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
  ElementType type;
  int64_t size;
};

#define TQ_DECLARE(isa)                                                     \
  namespace isa {                                                           \
  /* Merges the states of rows [begin, end). */                             \
  void merge_states(const MergeJob& job, int64_t begin, int64_t end);       \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
