#include "cpu/softmax_rows.h"

#include "common/ordered_key.h"
#include "cpu/simd.h"
#include "cpu/exp_sum.h"

namespace tq {
namespace TQ_ISA {

namespace {

// A block is taken in groups: four vectors at a time, whose order inside a group is its own affair.
static_assert(kGroup == kParts * kLanes);

template <typename Element>
TQ_INLINE void load_group(Element, const typename Element::Stored* from, F32x16 (&x)[kParts]) {
  for (int part = 0; part < kParts; ++part) x[part] = Element::vector(from + part * kLanes);
}
template <typename Element>
TQ_INLINE int place_in_group(Element, int part, int lane) {
  return part * kLanes + lane;
}

// Two bf16 of a word are one operation each, where widening them in order takes two.
TQ_INLINE void load_group(BFloat16, const uint16_t* from, F32x16 (&x)[kParts]) {
  for (int part = 0; part < kParts; part += 2) {
    const U32x16 words = load_words(from + part * kLanes);
    x[part] = (F32x16)(words << 16);
    x[part + 1] = (F32x16)(words & 0xffff0000u);
  }
}
TQ_INLINE int place_in_group(BFloat16, int part, int lane) { return part / 2 * 2 * kLanes + 2 * lane + part % 2; }

// A block of a row; its last group, where it is not whole, is a copy filled up with -inf.
template <typename Element>
struct Block {
  using Stored = typename Element::Stored;
  const Stored* data;
  int64_t first;
  int64_t count;
  int64_t num_groups;
  Stored last[kGroup];

  TQ_ALWAYS_INLINE Block(const Stored* from, int64_t first_id, int64_t size)
      : data(from), first(first_id), count(size), num_groups((size + kGroup - 1) / kGroup) {
    const int64_t whole = count / kGroup * kGroup;
    if (whole == count) return;
    for (int64_t i = 0; i < kGroup; ++i) {
      last[i] = whole + i < count ? data[whole + i] : Element::rounded(kMinusInfinity);
    }
  }
  TQ_ALWAYS_INLINE Block(const LogitsRow& row, int64_t b)
      : Block(
            static_cast<const Stored*>(row.data) + b * kBlock, b * kBlock,
            row.size - b * kBlock < kBlock ? row.size - b * kBlock : kBlock) {}
  TQ_ALWAYS_INLINE void load(int64_t group, F32x16 (&x)[kParts]) const {
    load_group(Element{}, (group + 1) * kGroup <= count ? data + group * kGroup : last, x);
  }
};

// Peaks of the strands of a block, NaN left out.
struct BlockPeaks {
  F32x16 parts[kParts];

  TQ_ALWAYS_INLINE float top() const {
    return reduce_max(max_or_second(max_or_second(parts[0], parts[1]), max_or_second(parts[2], parts[3])));
  }
};

template <typename Element>
TQ_INLINE BlockPeaks peaks_of(const Block<Element>& block) {
  const F32x16 lowest = broadcast(kMinusInfinity);
  BlockPeaks peaks{{lowest, lowest, lowest, lowest}};
  for (int64_t group = 0; group < block.num_groups; ++group) {
    F32x16 x[kParts];
    block.load(group, x);
    for (int part = 0; part < kParts; ++part) peaks.parts[part] = max_or_second(x[part], peaks.parts[part]);
  }
  return peaks;
}

// How many elements ahead the memory is asked for what comes, a little for each group: it rests while
// the block in the cache is worked on, and by itself it looks no further than the page.
constexpr int64_t kAhead = 4096;

template <typename Element, bool kTempered>
TQ_INLINE float sum_exp(const Block<Element>& block, float peak, float inverse_temperature) {
  const F32x16 peaks = broadcast(peak);
  const F32x16 scales = broadcast(inverse_temperature);
  constexpr uintptr_t kStored = sizeof(typename Element::Stored);
  F32x16 sums[kParts] = {};
  for (int64_t group = 0; group < block.num_groups; ++group) {
    F32x16 x[kParts];
    block.load(group, x);
    // Beyond the end of the logits nothing is read: a prefetch of an address that is not there does nothing.
    const auto ahead = reinterpret_cast<uintptr_t>(block.data + group * kGroup) + kAhead * kStored;
    for (uintptr_t line = ahead; line < ahead + kGroup * kStored; line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
    }
    for (int part = 0; part < kParts; ++part) {
      x[part] = x[part] - peaks;
      if (kTempered) x[part] = x[part] * scales;
    }
    add_exp(x, sums);
  }
  return static_cast<float>(reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

template <typename Element>
void push_strands(int64_t b, const BlockPeaks& peaks, TopKQueue* queue) {
  for (int part = 0; part < kParts; ++part) {
    uint32_t mask = mask_not_le(peaks.parts[part], broadcast(queue->threshold));
    if (mask == 0) continue;
    alignas(64) float values[kLanes];
    store(values, peaks.parts[part]);
    for (; mask != 0; mask &= mask - 1) {
      const int lane = __builtin_ctz(mask);
      const uint32_t id = strand_id(b, place_in_group(Element{}, part, lane));
      queue->keys[queue->size++] = ordered_key(values[lane], id);
    }
  }
}

template <typename Element>
TQ_INLINE void reduce_block(const BlockReduction& job, int64_t b, const Block<Element>& block, bool is_first) {
  const BlockPeaks peaks = peaks_of(block);
  const float peak = peaks.top();
  const bool is_empty = peak == kMinusInfinity;
  job.states[b] = {peak, is_empty ? 0.0f : sum_exp<Element, false>(block, peak, 1.0f)};
  if (job.tempered_sums != nullptr) {
    job.tempered_sums[b] = is_empty ? 0.0f : sum_exp<Element, true>(block, peak, job.inverse_temperature);
  }
  if (job.queue == nullptr) return;
  if (!(peak <= job.queue->threshold)) push_strands<Element>(b, peaks, job.queue);
  if (is_first || job.queue->size >= job.queue->limit) topk_shrink(job.queue);
}

template <typename Element>
void reduce_typed_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end) {
  for (int64_t b = block_begin; b < block_end; ++b) {
    reduce_block(job, b, Block<Element>(job.row, b), b == block_begin);
  }
}

// The block as floats in `values`, NaN as -inf, its tail padded with -inf to a whole group.
template <typename Element, bool kDivide>
TQ_INLINE void load_block(const Block<Element>& block, float divisor, float* values) {
  const F32x16 divisors = broadcast(divisor);
  for (int64_t i = 0; i < block.count; i += kLanes) {
    F32x16 x = broadcast(kMinusInfinity);
    if (i + kLanes <= block.count) {
      x = Element::vector(block.data + i);
    } else {
      float last[kLanes];
      store(last, x);
      for (int64_t lane = 0; i + lane < block.count; ++lane) last[lane] = Element::scalar(block.data[i + lane]);
      x = load(last);
    }
    store(values + i, clean(kDivide ? x / divisors : x));
  }
}

// Quotients are made once, and reduced like logits of their own.
template <typename Element>
void reduce_divided_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end) {
  alignas(64) float values[kBlock];
  for (int64_t b = block_begin; b < block_end; ++b) {
    const Block<Element> block(job.row, b);
    load_block<Element, true>(block, job.divisor, values);
    reduce_block(job, b, Block<Float32>(values, block.first, block.count), b == block_begin);
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
  load_block<Element, false>(block, 1.0f, values);
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
int64_t gather_typed_strands(const LogitsRow& row, float divisor, const TopKQueue& queue, uint64_t* keys) {
  int64_t count = 0;
  for (int64_t n = 0; n < queue.size; ++n) {
    const int64_t strand = id_of_key(queue.keys[n]);
    const Block<Element> block(row, strand / kGroup);
    for (int64_t i = strand % kGroup; i < block.count; i += kGroup) {
      float value = Element::scalar(block.data[i]);
      if (divisor != 1.0f) value /= divisor;
      value = value == value ? value : kMinusInfinity;
      if (value < queue.threshold) continue;
      keys[count++] = ordered_key(value, static_cast<uint32_t>(block.first + i));
    }
  }
  return count;
}

template <typename Element>
void masses_of_typed_row(const LogitsRow& row, float peak, float inverse_temperature, float* values, float* masses) {
  for (int64_t b = 0; b < num_blocks(row.size); ++b) {
    const Block<Element> block(row, b);
    load_block<Element, false>(block, 1.0f, values + block.first);
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
    TQ_BY_ELEMENT(job.row, reduce_typed_blocks<Element>(job, block_begin, block_end));
  } else {
    TQ_BY_ELEMENT(job.row, reduce_divided_blocks<Element>(job, block_begin, block_end));
  }
}

int64_t gather_strands(const LogitsRow& row, float divisor, const TopKQueue& queue, uint64_t* keys) {
  TQ_BY_ELEMENT(row, gather_typed_strands<Element>(row, divisor, queue, keys));
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
