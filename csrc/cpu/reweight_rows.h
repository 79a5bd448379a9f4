// reweight_sample for some prompts: common/reweight.h with a candidate in every lane. One copy for each ISA.
#pragma once

#include "common/platform.h"
#include "cpu/isa.h"
#include "cpu/reweight_job.h"

namespace tq {

// The lanes of the widest vector: of doubles, where a candidate lies in each.
constexpr int64_t kMostLanes = 8;

TQ_HOST_DEVICE int64_t rounded_up(int64_t count) { return (count + kMostLanes - 1) / kMostLanes * kMostLanes; }

// How many doubles of room a prompt needs: four of each candidate, weights and rewards.
TQ_HOST_DEVICE int64_t reweight_room(int64_t k, int64_t n) { return rounded_up(k) * (4 + 2 * rounded_up(n)); }

#define TQ_DECLARE(isa)                                                                                  \
  namespace isa {                                                                                        \
  /* Prompts begin to end. A prompt's results depend on nothing of the others. */                        \
  void reweight_floats(const ReweightJob<float>& job, int64_t begin, int64_t end, double* room);         \
  void reweight_doubles(const ReweightJob<double>& job, int64_t begin, int64_t end, double* room);       \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
