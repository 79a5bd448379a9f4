#include "cpu/sampling/topk_rows.h"

#include "common/ordered_key.h"
#include "cpu/sampling/load_logits.h"

namespace tq {
namespace TQ_ISA {

namespace {

int64_t count_at_least(const float* values, int64_t count, float least) {
  const F32x16 bound = broadcast(least);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) found += __builtin_popcount(mask_not_lt(load(values + i), bound));
  return found;
}

// Skips the vectors in which no strand's peak reaches `least`.
template <typename Element>
TQ_INLINE int64_t gather(const Block<Element>& block, const float* strand_peaks, float least, uint64_t* keys) {
  const F32x16 bound = broadcast(least);
  int64_t count = 0;
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    if (mask_not_lt(load(strand_peaks + part * kLanes), bound) == 0) continue;
    for (int64_t group = 0; group < block.num_groups; ++group) {
      F32x16 x[kParts];
      block.load(group, x);
      const F32x16 value = clean(x[part]);
      for (uint32_t mask = mask_not_lt(value, bound); mask != 0; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const int64_t i = group * kGroup + place_in_group(Element{}, part, lane);
        if (i < block.count) keys[count++] = ordered_key(value[lane], static_cast<uint32_t>(block.first + i));
      }
    }
  }
  return count;
}

// reduce_blocks took quotients as fp32 numbers; read them in the same way.
template <typename Element>
int64_t gather_from_typed_block(
    const LogitsRow& row, float divisor, int64_t b, const float* strand_peaks, float least, uint64_t* keys) {
  const Block<Element> block(row, b);
  if (divisor == 1.0f) return gather(block, strand_peaks, least, keys);
  alignas(64) float values[kBlock];
  load_block<Element, true>(block, divisor, values);
  return gather(Block<Float32>(values, block.first, block.count), strand_peaks, least, keys);
}

}  // namespace

float bound_of_largest(const float* values, int64_t count, int64_t k, float least, float most) {
  // At least k values reach `low`, and fewer reach `high`.
  uint32_t low = ordered_bits(least);
  uint32_t high = ordered_bits(most) + 1;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int64_t found = count_at_least(values, count, value_from_ordered_bits(middle));
    (found < k ? high : low) = middle;
    if (found == k) break;
  }
  return value_from_ordered_bits(low);
}

int64_t keep_at_least(const float* values, int64_t count, float least, float* kept) {
  int64_t num_kept = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    for (uint32_t mask = mask_not_lt(load(values + i), broadcast(least)); mask != 0; mask &= mask - 1) {
      kept[num_kept++] = values[i + __builtin_ctz(mask)];
    }
  }
  return num_kept;
}

int64_t gather_from_block(
    const LogitsRow& row, float divisor, int64_t b, const float* strand_peaks, float least, uint64_t* keys) {
  TQ_BY_ELEMENT(row, gather_from_typed_block<Element>(row, divisor, b, strand_peaks, least, keys));
}

}  // namespace TQ_ISA
}  // namespace tq
