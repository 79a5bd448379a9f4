// sample_tokens on CPU: block masses in one pass over the logits, then the inverse CDF of one uniform a row.
#include <tuple>

#include "cpu/sampling/draw_on_threads.h"

namespace tq {

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens_cpu(
    const Tensor& logits, const Tensor& keys, int64_t step, const std::optional<Tensor>& step_tensor,
    double temperature, const std::optional<Tensor>& temperatures, int64_t top_k, const std::optional<Tensor>& top_ks,
    double top_p, const std::optional<Tensor>& top_ps, int64_t vocab_size, int64_t seed,
    const std::optional<Tensor>& seed_tensor) {
  const DrawArguments arguments(
      "sample_tokens", logits, keys, step, step_tensor, temperature, temperatures, top_k, top_ks, top_p, top_ps,
      vocab_size, seed, seed_tensor);
  const int64_t rows = logits.size(0);
  Tensor ids = new_tensor({rows}, ScalarType::Long);
  Tensor logprobs = new_tensor({rows}, ScalarType::Float);
  Tensor proposal_logprobs = new_tensor({rows}, ScalarType::Float);
  Tensor valid = new_tensor({rows}, ScalarType::Bool);
  auto* const ids_out = static_cast<int64_t*>(ids.mutable_data_ptr());
  auto* const logprobs_out = static_cast<float*>(logprobs.mutable_data_ptr());
  auto* const proposals_out = static_cast<float*>(proposal_logprobs.mutable_data_ptr());
  auto* const valid_out = static_cast<bool*>(valid.mutable_data_ptr());
  draw_rows(
      arguments, [](int64_t) { return true; },
      [&](int64_t row, const DrawnToken& token) {
        ids_out[row] = token.id;
        logprobs_out[row] = token.logprob;
        proposals_out[row] = token.proposal_logprob;
        valid_out[row] = token.is_valid;
      });
  return {ids, logprobs, proposal_logprobs, valid};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens_cpu)); }

}  // namespace tq
