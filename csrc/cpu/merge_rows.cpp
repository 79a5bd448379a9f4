#include "cpu/merge_rows.h"

#include "common/attn_state.h"
#include "cpu/simd.h"

namespace tq {
namespace TQ_ISA {

namespace {

// A part of weight 0 is not read: it may hold NaN.
template <typename Element>
TQ_INLINE void mix_row(
    const typename Element::Stored* a, const typename Element::Stored* b, const AttentionMerge& merge, int64_t size,
    typename Element::Stored* out) {
  const bool takes_a = merge.weight_a > 0.0f;
  const bool takes_b = merge.weight_b > 0.0f;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    F32x16 sum = {};
    if (takes_a) sum += merge.weight_a * Element::vector(a + i);
    if (takes_b) sum += merge.weight_b * Element::vector(b + i);
    Element::store_rounded(out + i, sum);
  }
  for (; i < size; ++i) {
    float sum = 0.0f;
    if (takes_a) sum += merge.weight_a * Element::scalar(a[i]);
    if (takes_b) sum += merge.weight_b * Element::scalar(b[i]);
    out[i] = Element::rounded(sum);
  }
}

template <typename Element>
void merge_rows(const MergeJob& job, int64_t begin, int64_t end) {
  using Stored = typename Element::Stored;
  const auto* const a = static_cast<const Stored*>(job.out_a);
  const auto* const b = static_cast<const Stored*>(job.out_b);
  auto* const out = static_cast<Stored*>(job.out);
  for (int64_t row = begin; row < end; ++row) {
    const AttentionMerge merge = merge_attention_lse(job.lse_a[row], job.lse_b[row]);
    job.lse[row] = merge.lse;
    const int64_t at = row * job.size;
    mix_row<Element>(a + at, b + at, merge, job.size, out + at);
  }
}

}  // namespace

void merge_states(const MergeJob& job, int64_t begin, int64_t end) {
  switch (job.type) {
    case ElementType::kFloat32:
      return merge_rows<Float32>(job, begin, end);
    case ElementType::kBFloat16:
      return merge_rows<BFloat16>(job, begin, end);
    case ElementType::kFloat16:
      return merge_rows<Float16>(job, begin, end);
  }
}

}  // namespace TQ_ISA
}  // namespace tq
