// Softmax statistics of one row of logits, block by block. Compiled once for each ISA.
#pragma once

#include "cpu/sampling/logits_row.h"
#include "cpu/simd/double_exp_rows.h"
#include "cpu/simd/isa.h"

namespace tq {

// One pass over some blocks of a row, and where its results go. x is a logit, NaN as -inf.
struct BlockReduction {
  LogitsRow row;
  // Reduce x / divisor; 1 leaves x as it is.
  float divisor;
  // states[b]: peak and sum of exp(x - peak).
  SoftmaxState<float>* states;
  // Unless null, tempered_sums[b]: sum of exp((x - peak) * inverse_temperature).
  float* tempered_sums;
  float inverse_temperature;
  // Unless null, kGroup numbers from strand_peaks[b * kGroup] on: the peaks of the block's strands, in the
  // order that TopK::find reads.
  float* strand_peaks;
};

#define TQ_DECLARE(isa)                                                                  \
  namespace isa {                                                                        \
  void reduce_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end); \
  float value_at(const LogitsRow& row, int64_t id);                                      \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

// Merges all blocks of a row in order, in double.
static inline SoftmaxState<double> merge_blocks(const SoftmaxState<float>* states, int64_t count) {
  SoftmaxState<double> total = empty_softmax_state<double>();
  for (int64_t b = 0; b < count; ++b) {
    if (states[b].peak > total.peak) total.peak = static_cast<double>(states[b].peak);
  }
  if (total.peak == -INFINITY) return total;
  constexpr int64_t kTogether = 64;
  double shares[kTogether];
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t num = count - first < kTogether ? count - first : kTogether;
    for (int64_t i = 0; i < num; ++i) shares[i] = states[first + i].peak - total.peak;
    TQ_SELECT_ISA(exp_in_place)(shares, num);
    for (int64_t i = 0; i < num; ++i) total.sum += states[first + i].sum * shares[i];
  }
  return total;
}

}  // namespace tq
