// reweight_sample on CUDA: one launch, a block a prompt (cuda/reweight_prompt.h).
//
// Seed and step may lie on the device: they are read by the kernel, so that a captured graph draws
// new noise at every replay. No host synchronisation.
#include <algorithm>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/reweight_prompt.h"

namespace tq {

namespace {

// The scores lie in shared memory, one a candidate: as many as 32 KB hold.
constexpr int64_t kMostCandidates = 4096;

template <typename Real>
__global__ void __launch_bounds__(kThreads) reweight_sample_kernel(const DeviceReweightJob<Real> job) {
  reweight_prompt(job);
}

template <typename Real>
void launch(const DeviceReweightJob<Real>& job, cudaStream_t stream) {
  const int64_t lanes = job.k * lanes_a_candidate(job.n);
  const int64_t threads = std::clamp<int64_t>((lanes + 31) / 32 * 32, 32, kThreads);
  reweight_sample_kernel<Real>
      <<<static_cast<unsigned>(job.prompts), static_cast<unsigned>(threads), job.k * sizeof(double), stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> reweight_sample_cuda(
    const Tensor& prior_logprobs_in, const Tensor& token_ids_in, const Tensor& rewards_in,
    const std::optional<Tensor>& log_weights_in, const std::optional<Tensor>& lengths_in, double alpha, bool is_soft,
    bool is_greedy, int64_t seed, const std::optional<Tensor>& seed_in, const std::optional<Tensor>& keys_in,
    int64_t step, const std::optional<Tensor>& step_in) {
  const int32_t device = device_of("reweight_sample", prior_logprobs_in);
  const torch::stable::accelerator::DeviceGuard guard(device);
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
  const std::optional<Tensor> seed_tensor = dense(seed_in, ScalarType::Long);
  const std::optional<Tensor> step_tensor = dense(step_in, ScalarType::Long);
  const int64_t prompts = rewards.size(0);
  const int64_t k = rewards.size(1);
  STD_TORCH_CHECK(k <= kMostCandidates, "reweight_sample: k is ", k, ", expected at most ", kMostCandidates);

  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return new_cuda_tensor(device, sizes, type);
  };
  Tensor choice = make({prompts}, ScalarType::Long);
  Tensor final_logprobs = make({prompts, k}, ScalarType::Float);
  Tensor q = make({prompts, k}, ScalarType::Float);
  Tensor q_stderr = make({prompts, k}, ScalarType::Float);
  Tensor ess = make({prompts, k}, ScalarType::Float);
  if (prompts == 0) return {choice, final_logprobs, q, q_stderr, ess};

  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    launch<Real>(
        {static_cast<const Real*>(prior_logprobs.const_data_ptr()),
         static_cast<const int64_t*>(token_ids.const_data_ptr()), static_cast<const Real*>(rewards.const_data_ptr()),
         data_or_null<Real>(log_weights), data_or_null<int64_t>(lengths), data_or_null<int64_t>(keys), prompts, k,
         rewards.size(2), alpha, is_soft, is_greedy, device_int(seed, seed_tensor), device_int(step, step_tensor),
         static_cast<int64_t*>(choice.mutable_data_ptr()), static_cast<float*>(final_logprobs.mutable_data_ptr()),
         static_cast<float*>(q.mutable_data_ptr()), static_cast<float*>(q_stderr.mutable_data_ptr()),
         static_cast<float*>(ess.mutable_data_ptr())},
        current_stream(device));
  };
  if (is_float) {
    run(0.0f);
  } else {
    run(0.0);
  }
  return {choice, final_logprobs, q, q_stderr, ess};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CUDA, m) { m.impl("reweight_sample", TORCH_BOX(&reweight_sample_cuda)); }

}  // namespace tq
