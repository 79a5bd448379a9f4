#include "cpu/sampling/topk.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "cpu/sampling/topk_rows.h"

namespace tq {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSixteen = 16;

int64_t fill_to_sixteens(float* values, int64_t count) {
  for (; count % kSixteen != 0; ++count) values[count] = -kInfinity;
  return count;
}

}  // namespace

// Returns a bound that at least k elements reach, and few more: the k-th largest strand peak. The peaks of
// blocks tell which blocks' strands can matter.
float TopK::find_least(const SoftmaxState<float>* states, const float* strand_peaks, int64_t blocks, int64_t k) {
  const auto bound_of_largest = TQ_SELECT_ISA(bound_of_largest);
  const auto keep_at_least = TQ_SELECT_ISA(keep_at_least);
  peaks_.resize((blocks + 1) * kGroup);
  float* const peaks = peaks_.data();
  float most = -kInfinity;
  for (int64_t b = 0; b < blocks; ++b) {
    peaks[b] = states[b].peak;
    most = std::max(most, peaks[b]);
  }
  float least = -kInfinity;
  if (k <= blocks) least = bound_of_largest(peaks, fill_to_sixteens(peaks, blocks), k, least, most);
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (states[b].peak >= least) count += keep_at_least(strand_peaks + b * kGroup, kGroup, least, peaks + count);
  }
  return count < k ? -kInfinity : bound_of_largest(peaks, fill_to_sixteens(peaks, count), k, least, most);
}

const uint64_t* TopK::find(
    const LogitsRow& row, float divisor, const SoftmaxState<float>* states, const float* strand_peaks, int64_t k) {
  const int64_t blocks = num_blocks(row.size);
  float least = find_least(states, strand_peaks, blocks, k);
  const auto gather_from_block = TQ_SELECT_ISA(gather_from_block);
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (states[b].peak < least) continue;
    keys_.resize(std::max<size_t>(keys_.size(), count + kBlock));
    const bool was_short = count < k;
    count += gather_from_block(row, divisor, b, strand_peaks + b * kGroup, least, keys_.data() + count);
    // Ids ascend, so once k elements are found, a later element that ties with the least of them has too
    // high an id: raise the bound.
    if (was_short && count >= k) least = std::nextafter(least, kInfinity);
  }
  std::partial_sort(keys_.begin(), keys_.begin() + k, keys_.begin() + count, std::greater<uint64_t>());
  return keys_.data();
}

}  // namespace tq
