// reweight_sample on CPU: threads over prompts (see reweight_rows.h).
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu/contract.h"
#include "cpu/reweight_rows.h"
#include "cpu/tensor_access.h"

namespace tq {

namespace {

// A vector of the row code, which is aligned.
struct alignas(64) Vector {
  double numbers[kMostLanes];
};

template <typename Real, typename Rows>
void run_on_threads(const ReweightJob<Real>& job, Rows rows) {
  const auto run = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Vector[]> room(new Vector[reweight_room(job.k, job.n) / kMostLanes]);
    rows(job, begin, end, room[0].numbers);
  };
  if (!is_long(job)) return run(0, job.prompts);
  const int64_t per_thread = kNanosecondsPerThread / nanoseconds_per_prompt(job);
  torch::stable::parallel_for(0, job.prompts, per_thread < 1 ? 1 : per_thread, run);
}

void run_reweight(const ReweightJob<double>& job) { run_on_threads(job, TQ_SELECT_ISA(reweight_doubles)); }

}  // namespace

void run_reweight(const ReweightJob<float>& job) { run_on_threads(job, TQ_SELECT_ISA(reweight_floats)); }

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
    run_reweight(ReweightJob<Real>{
        static_cast<const Real*>(prior_logprobs.const_data_ptr()),
        static_cast<const int64_t*>(token_ids.const_data_ptr()),
        static_cast<const Real*>(rewards.const_data_ptr()),
        data_or_null<Real>(log_weights),
        data_or_null<int64_t>(lengths),
        data_or_null<int64_t>(keys),
        prompts,
        k,
        rewards.size(2),
        alpha,
        is_soft,
        is_greedy,
        read_int(seed, seed_tensor),
        read_int(step, step_tensor),
        static_cast<int64_t*>(choice.mutable_data_ptr()),
        static_cast<float*>(final_logprobs.mutable_data_ptr()),
        static_cast<float*>(q.mutable_data_ptr()),
        static_cast<float*>(q_stderr.mutable_data_ptr()),
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
