// How a reweight_sample whose tensors are dense arrays is run; for csrc/cpu and csrc/bind_direct.cpp.
#pragma once

#include <cstdint>

#include "common/reweight.h"

namespace tq {

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
