// What reweight_sample works on once its tensors are dense arrays; from csrc/cpu and csrc/bind_direct.cpp.
#pragma once

#include <cstdint>

namespace tq {

// Arrays of the contract (tq_fast/ops/reweight_sample.py); what is optional there may be null.
template <typename Real>
struct ReweightJob {
  const Real* prior_logprobs;
  const int64_t* token_ids;
  const Real* rewards;
  const Real* log_weights;
  const int64_t* lengths;
  const int64_t* keys;
  int64_t prompts;
  int64_t k;
  int64_t n;
  double alpha;
  bool is_soft;
  bool is_greedy;
  int64_t seed;
  int64_t step;
  int64_t* choice;
  float* final_logprobs;
  float* q;
  float* q_stderr;
  float* ess;
};

// About how many nanoseconds one thread takes for a prompt, and from how many on another is worth waking:
// measured with threads that slept before, and with threads that did not.
template <typename Real>
int64_t nanoseconds_per_prompt(const ReweightJob<Real>& job) {
  return job.k * (job.n + 8);
}

constexpr int64_t kNanosecondsPerThread = 5000;

// Whether it is worth more than one thread.
template <typename Real>
bool is_long(const ReweightJob<Real>& job) {
  return job.prompts * nanoseconds_per_prompt(job) >= 2 * kNanosecondsPerThread;
}

// All prompts. The one function that another library calls, bind_direct.cpp.
__attribute__((visibility("default"))) void run_reweight(const ReweightJob<float>& job);

}  // namespace tq
