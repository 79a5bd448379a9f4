#include "cpu/softmax_rows.h"

#include "common/ordered_key.h"
#include "cpu/simd.h"

namespace tq {
namespace TQ_ISA {

namespace {

// Peaks of kNumPeaks interleaved parts of a block.
constexpr int kNumPeaks = 4 * kLanes;

struct BlockPeaks {
  F32x16 parts[4];

  TQ_ALWAYS_INLINE float top() const {
    return reduce_max(max_or_second(max_or_second(parts[0], parts[1]), max_or_second(parts[2], parts[3])));
  }
};

// The block as floats in `values`, its tail padded with -inf to a whole vector.
template <typename Element, bool kDivide>
TQ_INLINE BlockPeaks load_block(const typename Element::Stored* from, int64_t count, float divisor, float* values) {
  const F32x16 divisors = broadcast(divisor);
  const F32x16 lowest = broadcast(kMinusInfinity);
  BlockPeaks peaks{{lowest, lowest, lowest, lowest}};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      F32x16 x = Element::vector(from + i + part * kLanes);
      if (kDivide) x = x / divisors;
      x = clean(x);
      store(values + i + part * kLanes, x);
      peaks.parts[part] = max_or_second(x, peaks.parts[part]);
    }
  }
  for (; i < count; i += kLanes) {
    F32x16 x = broadcast(kMinusInfinity);
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    for (int64_t lane = 0; lane < left; ++lane) x[lane] = Element::scalar(from[i + lane]);
    if (kDivide) x = x / divisors;
    x = clean(x);
    store(values + i, x);
    peaks.parts[0] = max_or_second(x, peaks.parts[0]);
  }
  return peaks;
}

// `values` holds a whole number of vectors, padded with -inf.
float sum_exp(const float* values, int64_t count, float peak) {
  const F32x16 peaks = broadcast(peak);
  F32x16 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) sums[part] += exp_for_sum(load(values + i + part * kLanes) - peaks);
  }
  for (; i < count; i += kLanes) sums[0] += exp_for_sum(load(values + i) - peaks);
  return static_cast<float>(reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

void push_above_threshold(const float* values, int64_t count, int64_t first_id, TopKQueue* queue) {
  F32x16 threshold = broadcast(queue->threshold);
  for (int64_t i = 0; i < count; i += kLanes) {
    uint32_t mask = mask_not_le(load(values + i), threshold);
    if (count - i < kLanes) mask &= (1u << (count - i)) - 1u;
    if (mask == 0) continue;
    if (queue->size + kLanes > queue->capacity) {
      topk_shrink(queue);
      threshold = broadcast(queue->threshold);
      mask &= mask_not_le(load(values + i), threshold);
    }
    while (mask != 0) {
      const int lane = __builtin_ctz(mask);
      mask &= mask - 1;
      queue->keys[queue->size++] = ordered_key(values[i + lane], static_cast<uint32_t>(first_id + i + lane));
    }
  }
}

template <typename Element, bool kDivide>
void reduce_blocks(
    const LogitsRow& row, float divisor, int64_t block_begin, int64_t block_end, SoftmaxState<float>* states,
    TopKQueue* queue) {
  const auto* data = static_cast<const typename Element::Stored*>(row.data);
  alignas(64) float values[kBlock];
  for (int64_t b = block_begin; b < block_end; ++b) {
    const int64_t first = b * kBlock;
    const int64_t count = row.size - first < kBlock ? row.size - first : kBlock;
    const BlockPeaks peaks = load_block<Element, kDivide>(data + first, count, divisor, values);
    const float peak = peaks.top();
    const bool is_empty = peak == kMinusInfinity;
    states[b] = {peak, is_empty ? 0.0f : sum_exp(values, count, peak)};
    if (queue == nullptr) continue;
    if (b == block_begin) {
      alignas(64) float parts[kNumPeaks];
      for (int part = 0; part < 4; ++part) store(parts + part * kLanes, peaks.parts[part]);
      topk_start(queue, parts, kNumPeaks);
    }
    if (!(peak <= queue->threshold)) push_above_threshold(values, count, first, queue);
  }
}

template <typename Element>
void reduce_blocks(
    const LogitsRow& row, float divisor, int64_t block_begin, int64_t block_end, SoftmaxState<float>* states,
    TopKQueue* queue) {
  if (divisor == 1.0f) {
    reduce_blocks<Element, false>(row, divisor, block_begin, block_end, states, queue);
  } else {
    reduce_blocks<Element, true>(row, divisor, block_begin, block_end, states, queue);
  }
}

}  // namespace

void softmax_blocks(
    const LogitsRow& row, float divisor, int64_t block_begin, int64_t block_end, SoftmaxState<float>* states,
    TopKQueue* queue) {
  switch (row.type) {
    case ElementType::kFloat32:
      return reduce_blocks<Float32>(row, divisor, block_begin, block_end, states, queue);
    case ElementType::kBFloat16:
      return reduce_blocks<BFloat16>(row, divisor, block_begin, block_end, states, queue);
    case ElementType::kFloat16:
      return reduce_blocks<Float16>(row, divisor, block_begin, block_end, states, queue);
  }
}

}  // namespace TQ_ISA
}  // namespace tq
