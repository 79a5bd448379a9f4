// merge_attention_states on CPU: common/attn_state.h for every row, threads over rows.
#include <tuple>

#include "cpu/contract.h"
#include "cpu/merge_rows.h"
#include "cpu/tensor_access.h"

namespace tq {

namespace {

// Elements below which one thread is faster than waking another.
constexpr int64_t kElementsPerThread = 16384;

bool is_state(const Tensor& out, const Tensor& lse, const Tensor& like) {
  if (out.dim() < 1 || out.dim() != like.dim() || lse.dim() != out.dim() - 1) return false;
  for (int64_t axis = 0; axis < out.dim(); ++axis) {
    if (out.size(axis) != like.size(axis)) return false;
    if (axis < lse.dim() && lse.size(axis) != out.size(axis)) return false;
  }
  return out.scalar_type() == like.scalar_type() && lse.scalar_type() == ScalarType::Float;
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attention_states_cpu(
    const Tensor& out_a_in, const Tensor& lse_a_in, const Tensor& out_b_in, const Tensor& lse_b_in) {
  const char* const op = "merge_attention_states";
  require_contract(is_state(out_a_in, lse_a_in, out_a_in) && is_state(out_b_in, lse_b_in, out_a_in), op);
  const ElementType type = element_type_of(out_a_in, op, "out_a");
  const Tensor out_a = dense(out_a_in, out_a_in.scalar_type());
  const Tensor lse_a = dense(lse_a_in, ScalarType::Float);
  const Tensor out_b = dense(out_b_in, out_a_in.scalar_type());
  const Tensor lse_b = dense(lse_b_in, ScalarType::Float);
  Tensor out = torch::stable::empty_like(out_a);
  Tensor lse = torch::stable::empty_like(lse_a);
  const MergeJob job{
      out_a.const_data_ptr(),
      static_cast<const float*>(lse_a.const_data_ptr()),
      out_b.const_data_ptr(),
      static_cast<const float*>(lse_b.const_data_ptr()),
      out.mutable_data_ptr(),
      static_cast<float*>(lse.mutable_data_ptr()),
      type,
      out_a.size(out_a.dim() - 1)};
  const int64_t grain = kElementsPerThread / (job.size > 0 ? job.size : 1) + 1;
  const auto merge = TQ_SELECT_ISA(merge_states);
  torch::stable::parallel_for(
      0, lse_a.numel(), grain, [&](int64_t begin, int64_t end) { merge(job, begin, end); });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) {
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states_cpu));
}

}  // namespace tq
