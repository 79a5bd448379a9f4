// Softmax statistics of one row of logits, block by block. Compiled once for each ISA.
#pragma once

#include "cpu/isa.h"
#include "cpu/row_types.h"

namespace tq {

#define TQ_DECLARE(isa)                                                                          \
  namespace isa {                                                                                \
  /* states[b] of blocks [block_begin, block_end): peak and sum of exp(y - peak), y = x / divisor. \
     Pushes the elements y of those blocks into `queue` unless it is null. */                    \
  void softmax_blocks(const LogitsRow& row, float divisor, int64_t block_begin, int64_t block_end, \
                      SoftmaxState<float>* states, TopKQueue* queue);                            \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

// All blocks of a row, merged in order, in double.
static inline SoftmaxState<double> merge_blocks(const SoftmaxState<float>* states, int64_t count) {
  SoftmaxState<double> total = empty_softmax_state<double>();
  for (int64_t b = 0; b < count; ++b) {
    if (states[b].peak > total.peak) total.peak = static_cast<double>(states[b].peak);
  }
  for (int64_t b = 0; b < count; ++b) {
    total.sum += sum_at_peak(SoftmaxState<double>{states[b].peak, states[b].sum}, total.peak);
  }
  return total;
}

}  // namespace tq
