// advance_rollouts_ on CPU: sample_tokens, and its outcome written into the state of each live row.
#include <cmath>
#include <limits>

#include "cpu/sampling/draw_on_threads.h"

namespace tq {

namespace {

// An int32 or int64 tensor of one or two axes and any strides, read and written in place.
class IntegerView {
 public:
  explicit IntegerView(const Tensor& tensor)
      : data_(tensor.mutable_data_ptr()),
        is_wide_(tensor.scalar_type() == ScalarType::Long),
        outer_(tensor.stride(0)),
        inner_(tensor.dim() > 1 ? tensor.stride(1) : 0) {}
  int64_t get(int64_t i) const {
    return is_wide_ ? static_cast<const int64_t*>(data_)[i * outer_] : static_cast<const int32_t*>(data_)[i * outer_];
  }
  void set(int64_t i, int64_t j, int64_t value) const {
    const int64_t offset = i * outer_ + j * inner_;
    if (is_wide_) {
      static_cast<int64_t*>(data_)[offset] = value;
    } else {
      static_cast<int32_t*>(data_)[offset] = static_cast<int32_t>(value);
    }
  }

 private:
  void* data_;
  bool is_wide_;
  int64_t outer_;
  int64_t inner_;
};

}  // namespace

void advance_rollouts_cpu(
    const Tensor& logits, const Tensor& keys, int64_t step, const std::optional<Tensor>& step_tensor,
    const Tensor& tokens, const Tensor& lengths, const Tensor& finished, const Tensor& logprob_sums,
    const Tensor& proposal_logprob_sums, const Tensor& eos, double temperature,
    const std::optional<Tensor>& temperatures, int64_t top_k, const std::optional<Tensor>& top_ks, double top_p,
    const std::optional<Tensor>& top_ps, int64_t vocab_size, int64_t seed, const std::optional<Tensor>& seed_tensor) {
  const DrawArguments arguments(
      "advance_rollouts_", logits, keys, step, step_tensor, temperature, temperatures, top_k, top_ks, top_p, top_ps,
      vocab_size, seed, seed_tensor);
  const int64_t rows = logits.size(0);
  require_contract(
      tokens.dim() == 2 && is_integers(tokens, {rows, tokens.size(1)}) && is_integers(lengths, {rows}) &&
          has_shape(finished, {rows}) && finished.scalar_type() == ScalarType::Bool &&
          has_shape(logprob_sums, {rows}) && logprob_sums.scalar_type() == ScalarType::Float &&
          has_shape(proposal_logprob_sums, {rows}) && proposal_logprob_sums.scalar_type() == ScalarType::Float &&
          eos.dim() == 1 && is_integer(eos) && is_apart(tokens) && is_apart(lengths) && is_apart(finished) &&
          is_apart(logprob_sums) && is_apart(proposal_logprob_sums),
      "advance_rollouts_");
  const int64_t capacity = tokens.size(1);
  const IntegerView tokens_view(tokens);
  const IntegerView lengths_view(lengths);
  auto* const finished_data = static_cast<bool*>(finished.mutable_data_ptr());
  auto* const logprob_data = static_cast<float*>(logprob_sums.mutable_data_ptr());
  auto* const proposal_data = static_cast<float*>(proposal_logprob_sums.mutable_data_ptr());
  const int64_t finished_stride = finished.stride(0);
  const int64_t logprob_stride = logprob_sums.stride(0);
  const int64_t proposal_stride = proposal_logprob_sums.stride(0);
  const IntegerView eos_view(eos);
  const int64_t num_eos = eos.size(0);

  draw_rows(
      arguments,
      [&](int64_t row) {
        const int64_t length = lengths_view.get(row);
        return !finished_data[row * finished_stride] && length >= 0 && length < capacity;
      },
      [&](int64_t row, const DrawnToken& token) {
        if (!token.is_valid) {
          finished_data[row * finished_stride] = true;
          logprob_data[row * logprob_stride] = std::numeric_limits<float>::quiet_NaN();
          return;
        }
        const int64_t length = lengths_view.get(row);
        tokens_view.set(row, length, token.id);
        lengths_view.set(row, 0, length + 1);
        logprob_data[row * logprob_stride] += token.logprob;
        proposal_data[row * proposal_stride] += token.proposal_logprob;
        for (int64_t e = 0; e < num_eos; ++e) {
          if (eos_view.get(e) == token.id) finished_data[row * finished_stride] = true;
        }
      });
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("advance_rollouts_", TORCH_BOX(&advance_rollouts_cpu)); }

}  // namespace tq
