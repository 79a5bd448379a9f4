#include "cpu/sampling/softmax_rows.h"

#include "cpu/sampling/load_logits.h"
#include "cpu/simd/add_exp.h"

namespace tq {
namespace TQ_ISA {

namespace {

// Peaks of the strands of a block, NaN left out.
struct StrandPeaks {
  F32x16 parts[kParts];

  TQ_ALWAYS_INLINE StrandPeaks() {
    for (int part = 0; part < kParts; ++part) parts[part] = broadcast(kMinusInfinity);
  }
  TQ_ALWAYS_INLINE void add(const F32x16 (&x)[kParts]) {
    for (int part = 0; part < kParts; ++part) parts[part] = max_or_second(x[part], parts[part]);
  }
  TQ_ALWAYS_INLINE float top() const {
    return reduce_max(max_or_second(max_or_second(parts[0], parts[1]), max_or_second(parts[2], parts[3])));
  }
};

// Prefetch distance in bytes. The hardware prefetches within a page only.
constexpr uintptr_t kAhead = 16384;

// Prefetching beyond the end of the logits is harmless: a prefetch of an address that is not there does
// nothing.
template <typename Stored>
TQ_INLINE void prefetch_group(const Stored* group) {
  const auto ahead = reinterpret_cast<uintptr_t>(group) + kAhead;
  for (uintptr_t line = ahead; line < ahead + kGroup * sizeof(Stored); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 3);
  }
}

// Returns the sum of exp((x - reference) * inverse_temperature). Without `kTempered`, finds the strands'
// peaks in the same pass.
template <typename Element, bool kTempered>
TQ_INLINE float sum_exp(const Block<Element>& block, float reference, float inverse_temperature, StrandPeaks* peaks) {
  const F32x16 references = broadcast(reference);
  const F32x16 scales = broadcast(inverse_temperature);
  F32x16 sums[kParts] = {};
  StrandPeaks seen;
  for (int64_t group = 0; group < block.num_groups; ++group) {
    F32x16 x[kParts];
    block.load(group, x);
    if (!kTempered) {
      prefetch_group(block.data + group * kGroup);
      seen.add(x);
    }
    for (int part = 0; part < kParts; ++part) {
      x[part] = x[part] - references;
      if (kTempered) x[part] = x[part] * scales;
    }
    add_exp(x, sums);
  }
  if (!kTempered) *peaks = seen;
  return static_cast<float>(reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// The peak may lie this far above the reference of the exponentials; their relative error grows with the
// distance.
constexpr float kMostAbove = 8.0f;

// Finds the peak of a block and its sum in one pass. The reference of the exponentials is the peak of the
// first group, which is almost always near enough; otherwise a second pass sums again.
template <typename Element>
TQ_INLINE SoftmaxState<float> reduce_at_once(const Block<Element>& block, StrandPeaks* peaks) {
  StrandPeaks first;
  F32x16 x[kParts];
  block.load(0, x);
  first.add(x);
  const float reference = first.top();
  const float sum = sum_exp<Element, false>(block, reference, 1.0f, peaks);
  const float peak = peaks->top();
  if (peak - reference <= kMostAbove) return {peak, sum * exp_nonpositive(broadcast(reference - peak))[0]};
  if (peak == kMinusInfinity) return {peak, 0.0f};
  return {peak, sum_exp<Element, false>(block, peak, 1.0f, peaks)};
}

template <typename Element>
TQ_INLINE void reduce_block(const BlockReduction& job, int64_t b, const Block<Element>& block) {
  StrandPeaks peaks;
  const SoftmaxState<float> state = reduce_at_once(block, &peaks);
  job.states[b] = state;
  if (job.tempered_sums != nullptr) {
    job.tempered_sums[b] = state.peak == kMinusInfinity
                               ? 0.0f
                               : sum_exp<Element, true>(block, state.peak, job.inverse_temperature, nullptr);
  }
  if (job.strand_peaks == nullptr) return;
  for (int part = 0; part < kParts; ++part) store(job.strand_peaks + b * kGroup + part * kLanes, peaks.parts[part]);
}

template <typename Element>
void reduce_typed_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end) {
  for (int64_t b = block_begin; b < block_end; ++b) reduce_block(job, b, Block<Element>(job.row, b));
}

// Divides a block once, and reduces the quotients as fp32 logits.
template <typename Element>
void reduce_divided_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end) {
  alignas(64) float values[kBlock];
  for (int64_t b = block_begin; b < block_end; ++b) {
    const Block<Element> block(job.row, b);
    load_block<Element, true>(block, job.divisor, values);
    reduce_block(job, b, Block<Float32>(values, block.first, block.count));
  }
}

}  // namespace

void reduce_blocks(const BlockReduction& job, int64_t block_begin, int64_t block_end) {
  if (job.divisor == 1.0f) {
    TQ_BY_ELEMENT(job.row, reduce_typed_blocks<Element>(job, block_begin, block_end));
  } else {
    TQ_BY_ELEMENT(job.row, reduce_divided_blocks<Element>(job, block_begin, block_end));
  }
}

float value_at(const LogitsRow& row, int64_t id) {
  TQ_BY_ELEMENT(row, Element::scalar(static_cast<const typename Element::Stored*>(row.data)[id]));
}

}  // namespace TQ_ISA
}  // namespace tq
