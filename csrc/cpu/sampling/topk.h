// The k largest of a row, from the peaks that its reduction left.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sampling/logits_row.h"

namespace tq {

// Keeps its room from row to row.
class TopK {
 public:
  // Returns the keys (common/ordered_key.h) of the k largest x / divisor, the largest first, the lower id
  // first among equals; k is at most the size of the row. `states` and `strand_peaks` come from
  // reduce_blocks with the same divisor.
  const uint64_t* find(
      const LogitsRow& row, float divisor, const SoftmaxState<float>* states, const float* strand_peaks, int64_t k);

 private:
  float find_least(const SoftmaxState<float>* states, const float* strand_peaks, int64_t blocks, int64_t k);

  std::vector<float> peaks_;
  std::vector<uint64_t> keys_;
};

}  // namespace tq
