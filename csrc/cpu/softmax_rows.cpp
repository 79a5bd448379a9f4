#include "cpu/softmax_rows.h"

#include "common/ordered_key.h"
#include "cpu/simd.h"
#include "cpu/transcendental.h"

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
template <bool kTempered>
float sum_exp(const float* values, int64_t count, float peak, float inverse_temperature) {
  const F32x16 peaks = broadcast(peak);
  const F32x16 scales = broadcast(inverse_temperature);
  F32x16 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      const F32x16 x = load(values + i + part * kLanes) - peaks;
      sums[part] += exp_for_sum(kTempered ? x * scales : x);
    }
  }
  for (; i < count; i += kLanes) {
    const F32x16 x = load(values + i) - peaks;
    sums[0] += exp_for_sum(kTempered ? x * scales : x);
  }
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

template <typename Element>
struct Block {
  const typename Element::Stored* data;
  int64_t first;
  int64_t count;

  TQ_ALWAYS_INLINE Block(const LogitsRow& row, int64_t b)
      : data(static_cast<const typename Element::Stored*>(row.data) + b * kBlock),
        first(b * kBlock),
        count(row.size - b * kBlock < kBlock ? row.size - b * kBlock : kBlock) {}
};

// Asks for a block while the one before it, already in the cache, is worked on, since the memory rests
// meanwhile. For four-byte elements only: with two bytes each the arithmetic takes longer than the memory.
template <typename Element>
TQ_INLINE void prefetch_block(const LogitsRow& row, int64_t b) {
  if (sizeof(typename Element::Stored) < 4 || b >= num_blocks(row.size)) return;
  const Block<Element> block(row, b);
  constexpr int64_t kStoredPerLine = 64 / sizeof(typename Element::Stored);
  for (int64_t i = 0; i < block.count; i += kStoredPerLine) __builtin_prefetch(block.data + i);
}

template <typename Element, bool kDivide>
void reduce_typed_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end) {
  alignas(64) float values[kBlock];
  for (int64_t b = block_begin; b < block_end; ++b) {
    const Block<Element> block(job.row, b);
    const BlockPeaks peaks = load_block<Element, kDivide>(block.data, block.count, job.divisor, values);
    prefetch_block<Element>(job.row, b + 1);
    const float peak = peaks.top();
    const bool is_empty = peak == kMinusInfinity;
    job.states[b] = {peak, is_empty ? 0.0f : sum_exp<false>(values, block.count, peak, 1.0f)};
    if (job.tempered_sums != nullptr) {
      job.tempered_sums[b] = is_empty ? 0.0f : sum_exp<true>(values, block.count, peak, job.inverse_temperature);
    }
    if (job.queue == nullptr) continue;
    if (b == block_begin) {
      alignas(64) float parts[kNumPeaks];
      for (int part = 0; part < 4; ++part) store(parts + part * kLanes, peaks.parts[part]);
      topk_start(job.queue, parts, kNumPeaks);
    }
    if (!(peak <= job.queue->threshold)) push_above_threshold(values, block.count, block.first, job.queue);
  }
}

// The masses of one vector of values, in sixteens up to `count`; exactly 0 for -inf.
TQ_INLINE F32x16 masses_of(const float* values, float peak, float inverse_temperature) {
  return exp_nonpositive((load(values) - broadcast(peak)) * inverse_temperature);
}

template <typename Element>
int64_t draw_in_typed_block(
    const LogitsRow& row, int64_t b, float peak, float inverse_temperature, double target) {
  alignas(64) float values[kBlock];
  const Block<Element> block(row, b);
  load_block<Element, false>(block.data, block.count, 1.0f, values);
  double running = 0.0;
  int64_t last_with_mass = 0;
  for (int64_t i = 0; i < block.count; i += kLanes) {
    alignas(64) float masses[kLanes];
    store(masses, masses_of(values + i, peak, inverse_temperature));
    for (int lane = 0; lane < kLanes; ++lane) {
      running += masses[lane];
      if (masses[lane] > 0.0f) last_with_mass = i + lane;
      if (running > target) return block.first + i + lane;
    }
  }
  return block.first + last_with_mass;
}

template <typename Element>
int64_t find_in_typed_block(const LogitsRow& row, int64_t b, float value) {
  const Block<Element> block(row, b);
  for (int64_t i = 0; i < block.count; ++i) {
    if (Element::scalar(block.data[i]) == value) return block.first + i;
  }
  return block.first;
}

template <typename Element>
void masses_of_typed_row(const LogitsRow& row, float peak, float inverse_temperature, float* values, float* masses) {
  for (int64_t b = 0; b < num_blocks(row.size); ++b) {
    const Block<Element> block(row, b);
    load_block<Element, false>(block.data, block.count, 1.0f, values + block.first);
    for (int64_t i = block.first; i < block.first + block.count; i += kLanes) {
      store(masses + i, masses_of(values + i, peak, inverse_temperature));
    }
  }
}

}  // namespace

// Calls function<Element>(arguments...) for the row's element type.
#define TQ_BY_ELEMENT(row, call)                                    \
  switch ((row).type) {                                             \
    case ElementType::kFloat32: {                                   \
      using Element = Float32;                                      \
      return call;                                                  \
    }                                                               \
    case ElementType::kBFloat16: {                                  \
      using Element = BFloat16;                                     \
      return call;                                                  \
    }                                                               \
    default: {                                                      \
      using Element = Float16;                                      \
      return call;                                                  \
    }                                                               \
  }

void reduce_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end) {
  if (job.divisor == 1.0f) {
    TQ_BY_ELEMENT(job.row, (reduce_typed_blocks<Element, false>(job, block_begin, block_end)));
  } else {
    TQ_BY_ELEMENT(job.row, (reduce_typed_blocks<Element, true>(job, block_begin, block_end)));
  }
}

int64_t find_in_block(const LogitsRow& row, int64_t b, float value) {
  TQ_BY_ELEMENT(row, find_in_typed_block<Element>(row, b, value));
}

int64_t draw_in_block(const LogitsRow& row, int64_t b, float peak, float inverse_temperature, double target) {
  TQ_BY_ELEMENT(row, draw_in_typed_block<Element>(row, b, peak, inverse_temperature, target));
}

void masses_of_row(const LogitsRow& row, float peak, float inverse_temperature, float* values, float* masses) {
  TQ_BY_ELEMENT(row, masses_of_typed_row<Element>(row, peak, inverse_temperature, values, masses));
}

double mass_from(const float* values, const float* masses, int64_t count, float least) {
  const F32x16 bound = broadcast(least);
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    F32x16 sum = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      const I32x16 is_in = load(values + i) >= bound;
      sum += (F32x16)((I32x16)load(masses + i) & is_in);
    }
    total += reduce_sum(sum);
  }
  return total;
}

float value_at(const LogitsRow& row, int64_t id) {
  TQ_BY_ELEMENT(row, Element::scalar(static_cast<const typename Element::Stored*>(row.data)[id]));
}

}  // namespace TQ_ISA
}  // namespace tq
