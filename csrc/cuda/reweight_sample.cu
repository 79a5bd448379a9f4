// reweight_sample on CUDA: one launch, one warp a prompt, one lane a candidate (common/reweight.h).
//
// Seed and step may lie on the device: they are read by the kernel, so that a captured graph draws
// new noise at every replay. No host synchronisation.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "common/reweight.h"
#include "stable_tensor.h"

namespace tq {

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// A score a candidate in shared memory: what 32 KB hold.
constexpr int64_t kMostCandidates = 4096;

// A number, or the place on the device where it stands.
struct DeviceInt {
  int64_t number;
  const int64_t* place;
  __device__ int64_t read() const { return place == nullptr ? number : *place; }
};

template <typename Real>
struct Job {
  const Real* prior_logprobs;
  const int64_t* token_ids;
  const Real* rewards;
  const Real* log_weights;
  const int64_t* lengths;
  const int64_t* keys;
  int64_t k;
  int64_t n;
  double alpha;
  bool is_soft;
  bool is_greedy;
  DeviceInt seed;
  DeviceInt step;
  int64_t* choice;
  float* final_logprobs;
  float* q;
  float* q_stderr;
  float* ess;
};

__device__ double warp_max(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Pairs of lanes in a fixed order: the same sum on every lane and at every run.
__device__ double warp_sum(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <typename Real>
__global__ void __launch_bounds__(kWarp) reweight_sample_kernel(const Job<Real> job) {
  extern __shared__ double scores[];
  const int64_t g = blockIdx.x;
  const int lane = threadIdx.x;
  double peak = -INFINITY;
  for (int64_t z = lane; z < job.k; z += kWarp) {
    const int64_t at = g * job.k + z;
    int64_t valid = job.lengths == nullptr ? job.n : job.lengths[at];
    valid = valid < job.n ? valid : job.n;
    const CandidateValue value = value_candidate<Real>(
        job.rewards + at * job.n, job.log_weights == nullptr ? nullptr : job.log_weights + at * job.n, valid,
        job.alpha, job.is_soft, nullptr);
    job.q[at] = static_cast<float>(value.q);
    job.q_stderr[at] = static_cast<float>(value.standard_error);
    job.ess[at] = static_cast<float>(value.ess);
    scores[z] = candidate_score(static_cast<double>(job.prior_logprobs[at]), value.q, job.alpha);
    peak = scores[z] > peak ? scores[z] : peak;
  }
  peak = warp_max(peak);
  double mass = 0.0;
  for (int64_t z = lane; z < job.k; z += kWarp) mass += scores[z] == -INFINITY ? 0.0 : ::exp(scores[z] - peak);
  const double lse = peak + ::log(warp_sum(mass));

  const int64_t key = job.keys == nullptr ? g : job.keys[g];
  const int64_t seed = job.seed.read();
  const int64_t step = job.step.read();
  double best_score = -INFINITY;
  long long best_id = INT64_MAX;
  long long best = 0;
  for (int64_t z = lane; z < job.k; z += kWarp) {
    const int64_t at = g * job.k + z;
    job.final_logprobs[at] = static_cast<float>(scores[z] == -INFINITY ? scores[z] : scores[z] - lse);
    const int64_t id = job.token_ids[at];
    const double noisy = job.is_greedy ? scores[z] : scores[z] + choice_gumbel(seed, key, step, id);
    if (is_chosen_before(noisy, id, best_score, best_id)) {
      best_score = noisy;
      best_id = id;
      best = z;
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double score = __shfl_xor_sync(kAllLanes, best_score, offset);
    const long long id = __shfl_xor_sync(kAllLanes, best_id, offset);
    const long long z = __shfl_xor_sync(kAllLanes, best, offset);
    const bool is_same = score == best_score && id == best_id;
    if (is_chosen_before(score, id, best_score, best_id) || (is_same && z < best)) {
      best_score = score;
      best_id = id;
      best = z;
    }
  }
  if (lane == 0) job.choice[g] = best;
}

template <typename Real>
void launch(const Job<Real>& job, int64_t prompts, cudaStream_t stream) {
  reweight_sample_kernel<Real>
      <<<static_cast<unsigned>(prompts), kWarp, job.k * sizeof(double), stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

DeviceInt device_int(int64_t number, const std::optional<Tensor>& tensor) {
  return {number, data_or_null<int64_t>(tensor)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> reweight_sample_cuda(
    const Tensor& prior_logprobs_in, const Tensor& token_ids_in, const Tensor& rewards_in,
    const std::optional<Tensor>& log_weights_in, const std::optional<Tensor>& lengths_in, double alpha, bool is_soft,
    bool is_greedy, int64_t seed, const std::optional<Tensor>& seed_in, const std::optional<Tensor>& keys_in,
    int64_t step, const std::optional<Tensor>& step_in) {
  const int32_t device = rewards_in.get_device_index();
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
    return new_tensor_on(aoti_torch_device_type_cuda(), device, sizes, type);
  };
  Tensor choice = make({prompts}, ScalarType::Long);
  Tensor final_logprobs = make({prompts, k}, ScalarType::Float);
  Tensor q = make({prompts, k}, ScalarType::Float);
  Tensor q_stderr = make({prompts, k}, ScalarType::Float);
  Tensor ess = make({prompts, k}, ScalarType::Float);
  if (prompts == 0) return {choice, final_logprobs, q, q_stderr, ess};

  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto run = [&](auto zero) {
    using Real = decltype(zero);
    launch<Real>(
        {static_cast<const Real*>(prior_logprobs.const_data_ptr()),
         static_cast<const int64_t*>(token_ids.const_data_ptr()), static_cast<const Real*>(rewards.const_data_ptr()),
         data_or_null<Real>(log_weights), data_or_null<int64_t>(lengths), data_or_null<int64_t>(keys), k,
         rewards.size(2), alpha, is_soft, is_greedy, device_int(seed, seed_tensor), device_int(step, step_tensor),
         static_cast<int64_t*>(choice.mutable_data_ptr()), static_cast<float*>(final_logprobs.mutable_data_ptr()),
         static_cast<float*>(q.mutable_data_ptr()), static_cast<float*>(q_stderr.mutable_data_ptr()),
         static_cast<float*>(ess.mutable_data_ptr())},
        prompts, static_cast<cudaStream_t>(stream));
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
