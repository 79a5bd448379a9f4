// trajectory_log_ratio on CPU: one pass over both logits of each token, threads over tokens.
#include <vector>

#include "cpu/sampling/softmax_rows.h"
#include "cpu/trajectory/trajectories.h"

namespace tq {

namespace {

struct TrajectoryLogits {
  Tensor tensor;
  ElementType type;
  int64_t vocab_size;

  LogitsRow at(int64_t row, int64_t t) const {
    const int64_t offset = row * tensor.stride(0) + t * tensor.stride(1);
    const auto* base = static_cast<const char*>(tensor.const_data_ptr());
    return {base + offset * static_cast<int64_t>(tensor.element_size()), type, vocab_size};
  }
};

double logprob_of_token(const LogitsRow& row, int64_t token, std::vector<SoftmaxState<float>>& states) {
  const int64_t blocks = num_blocks(row.size);
  TQ_SELECT_ISA(reduce_blocks)({row, 1.0f, states.data(), nullptr, 1.0f, nullptr}, 0, blocks);
  const SoftmaxState<double> state = merge_blocks(states.data(), blocks);
  const double value = TQ_SELECT_ISA(value_at)(row, token);
  // A row without any valid logit gives its tokens no mass: -inf. NaN is for rows with +inf.
  if (state.sum == 0.0 || std::isnan(value)) return -std::numeric_limits<double>::infinity();
  return token_logprob(value, state);
}

}  // namespace

Tensor trajectory_log_ratio_cpu(
    const Tensor& logits_p, const Tensor& logits_q, const Tensor& tokens, const Tensor& lengths,
    std::optional<int64_t> bound) {
  const char* const op = "trajectory_log_ratio";
  require_contract(
      Trajectories::are(tokens, lengths, logits_p) && Trajectories::are(tokens, lengths, logits_q) &&
          (bound.has_value() ? *bound <= logits_q.size(2) : logits_p.size(2) == logits_q.size(2)),
      op);
  const int64_t vocab_size = bound.value_or(logits_p.size(2));
  require_contract(vocab_size >= 1 && vocab_size <= logits_p.size(2), op);
  const TrajectoryLogits p{with_unit_inner_stride(logits_p), element_type_of(logits_p, op, "logits_p"), vocab_size};
  const TrajectoryLogits q{with_unit_inner_stride(logits_q), element_type_of(logits_q, op, "logits_q"), vocab_size};
  const Trajectories trajectories(tokens, lengths);
  const int64_t length = trajectories.length;
  std::vector<double> terms(trajectories.rows * length);
  torch::stable::parallel_for(0, trajectories.rows * length, 1, [&](int64_t begin, int64_t end) {
    std::vector<SoftmaxState<float>> states(num_blocks(vocab_size));
    for (int64_t i = begin; i < end; ++i) {
      if (!trajectories.counts(i / length, i % length)) continue;
      const int64_t token = trajectories.tokens[i];
      terms[i] = token < 0 || token >= vocab_size ? std::numeric_limits<double>::quiet_NaN()
                                                  : logprob_of_token(p.at(i / length, i % length), token, states) -
                                                        logprob_of_token(q.at(i / length, i % length), token, states);
    }
  });
  return trajectories.sum_rows(terms.data());
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("trajectory_log_ratio", TORCH_BOX(&trajectory_log_ratio_cpu)); }

}  // namespace tq
