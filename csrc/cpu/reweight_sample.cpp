// reweight_sample on CPU: a scalar loop over common/reweight.h, threads over prompts. It takes 0.3 % of a
// decoded token, so that vector code would not pay for its lines.
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/online_softmax.h"
#include "common/reweight.h"
#include "cpu/simd/double_exp_rows.h"
#include "cpu/tensors/contract.h"
#include "cpu/tensors/tensor_access.h"

namespace tq {

namespace {

// With fewer roll-outs than this, one thread is done before another is awake.
constexpr int64_t kRolloutsPerThread = 1024;

template <typename Real>
int64_t valid_rollouts(const ReweightJob<Real>& job, int64_t at) {
  return job.lengths == nullptr ? job.n : job.lengths[at] < job.n ? job.lengths[at] : job.n;
}

// Makes the weights [k, n] of the roll-outs of prompt g, up to a factor for each candidate. They are made
// together because exponentials are most of this op, and far cheaper in vectors.
template <typename Real>
void make_weights(const ReweightJob<Real>& job, int64_t g, double* weights) {
  for (int64_t z = 0; z < job.k; ++z) {
    const Real* const log_weights = job.log_weights + (g * job.k + z) * job.n;
    const double peak = largest_of(log_weights, valid_rollouts(job, g * job.k + z));
    for (int64_t i = 0; i < job.n; ++i) weights[z * job.n + i] = static_cast<double>(log_weights[i]) - peak;
  }
  TQ_SELECT_ISA(exp_in_place)(weights, job.k * job.n);
}

// Scores the candidates of prompt g and chooses one. `scores` is room for k numbers, `weights` for k * n.
template <typename Real>
void reweight_prompt(const ReweightJob<Real>& job, int64_t g, double* scores, double* weights) {
  const bool is_weighted = job.log_weights != nullptr;
  if (is_weighted) make_weights(job, g, weights);
  SoftmaxState<double> law = empty_softmax_state<double>();
  for (int64_t z = 0; z < job.k; ++z) {
    const int64_t at = g * job.k + z;
    const CandidateValue value = value_weighted(
        job.rewards + at * job.n, RolloutWeights{is_weighted ? weights + z * job.n : nullptr}, valid_rollouts(job, at),
        job.alpha, job.is_soft);
    job.q[at] = static_cast<float>(value.q);
    job.q_stderr[at] = static_cast<float>(value.standard_error);
    job.ess[at] = static_cast<float>(value.ess);
    scores[z] = candidate_score(static_cast<double>(job.prior_logprobs[at]), value.q, job.alpha);
    if (scores[z] > law.peak) law.peak = scores[z];
  }
  for (int64_t z = 0; z < job.k; ++z) law.sum += scores[z] == -INFINITY ? 0.0 : std::exp(scores[z] - law.peak);
  // Where the peak is infinite, the sum is not a number, and the peak is the lse.
  const double lse = law.peak == INFINITY ? law.peak : lse_of_softmax_state(law);
  const int64_t key = job.keys == nullptr ? g : job.keys[g];
  int64_t best = 0;
  double best_score = 0.0;
  for (int64_t z = 0; z < job.k; ++z) {
    const int64_t at = g * job.k + z;
    job.final_logprobs[at] = static_cast<float>(scores[z] == -INFINITY ? scores[z] : scores[z] - lse);
    const int64_t id = job.token_ids[at];
    const double noisy = job.is_greedy ? scores[z] : scores[z] + choice_gumbel(job.seed, key, job.step, id);
    if (z == 0 || is_chosen_before(noisy, id, best_score, job.token_ids[g * job.k + best])) {
      best = z;
      best_score = noisy;
    }
  }
  job.choice[g] = best;
}

template <typename Real>
void reweight_prompts(const ReweightJob<Real>& job) {
  const int64_t rollouts = job.k * (job.n + 4);  // the noise of a candidate takes as long as four
  const int64_t grain = kRolloutsPerThread / rollouts;
  torch::stable::parallel_for(0, job.prompts, grain < 1 ? 1 : grain, [&](int64_t begin, int64_t end) {
    std::vector<double> scores(job.k);
    std::vector<double> weights(job.log_weights == nullptr ? 0 : job.k * job.n);
    for (int64_t g = begin; g < end; ++g) reweight_prompt(job, g, scores.data(), weights.data());
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> reweight_sample_cpu(
    const Tensor& prior_logprobs_in, const Tensor& token_ids_in, const Tensor& rewards_in,
    const std::optional<Tensor>& log_weights_in, const std::optional<Tensor>& lengths_in, double alpha, bool is_soft,
    bool is_greedy, int64_t seed, const std::optional<Tensor>& seed_tensor, const std::optional<Tensor>& keys_in,
    int64_t step, const std::optional<Tensor>& step_tensor) {
  require_contract(
      rewards_in.dim() == 3 && rewards_in.size(1) >= 1 && is_floating(rewards_in) &&
          is_floats(prior_logprobs_in, {rewards_in.size(0), rewards_in.size(1)}) &&
          is_integers(token_ids_in, {rewards_in.size(0), rewards_in.size(1)}) &&
          (!log_weights_in.has_value() ||
           is_floats(*log_weights_in, {rewards_in.size(0), rewards_in.size(1), rewards_in.size(2)})) &&
          (!lengths_in.has_value() || is_integers(*lengths_in, {rewards_in.size(0), rewards_in.size(1)})) &&
          (!keys_in.has_value() || is_integers(*keys_in, {rewards_in.size(0)})) && alpha > 0.0 &&
          std::isfinite(alpha) && is_int(seed_tensor) && is_int(step_tensor),
      "reweight_sample");
  // float32 is read as it is; any other mixture of types is widened first.
  const bool is_float = prior_logprobs_in.scalar_type() == ScalarType::Float &&
                        rewards_in.scalar_type() == ScalarType::Float &&
                        (!log_weights_in.has_value() || log_weights_in->scalar_type() == ScalarType::Float);
  const ScalarType real = is_float ? ScalarType::Float : ScalarType::Double;
  const Tensor prior_logprobs = dense(prior_logprobs_in, real);
  const Tensor rewards = dense(rewards_in, real);
  const std::optional<Tensor> log_weights = dense(log_weights_in, real);
  const Tensor token_ids = dense(token_ids_in, ScalarType::Long);
  const std::optional<Tensor> lengths = dense(lengths_in, ScalarType::Long);
  const std::optional<Tensor> keys = dense(keys_in, ScalarType::Long);
  const int64_t prompts = rewards.size(0);
  const int64_t k = rewards.size(1);

  Tensor choice = new_tensor({prompts}, ScalarType::Long);
  Tensor final_logprobs = new_tensor({prompts, k}, ScalarType::Float);
  Tensor q = new_tensor({prompts, k}, ScalarType::Float);
  Tensor q_stderr = new_tensor({prompts, k}, ScalarType::Float);
  Tensor ess = new_tensor({prompts, k}, ScalarType::Float);

  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    reweight_prompts(
        ReweightJob<Real>{
            static_cast<const Real*>(prior_logprobs.const_data_ptr()),
            static_cast<const int64_t*>(token_ids.const_data_ptr()), static_cast<const Real*>(rewards.const_data_ptr()),
            data_or_null<Real>(log_weights), data_or_null<int64_t>(lengths), data_or_null<int64_t>(keys), prompts, k,
            rewards.size(2), alpha, is_soft, is_greedy, read_int(seed, seed_tensor), read_int(step, step_tensor),
            static_cast<int64_t*>(choice.mutable_data_ptr()), static_cast<float*>(final_logprobs.mutable_data_ptr()),
            static_cast<float*>(q.mutable_data_ptr()), static_cast<float*>(q_stderr.mutable_data_ptr()),
            static_cast<float*>(ess.mutable_data_ptr())});
  };
  if (is_float) {
    run(0.0f);
  } else {
    run(0.0);
  }
  return {choice, final_logprobs, q, q_stderr, ess};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("reweight_sample", TORCH_BOX(&reweight_sample_cpu)); }

}  // namespace tq
