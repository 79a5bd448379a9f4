// One prompt of reweight_sample by one block: some lanes of a warp a candidate, whose roll-outs they
// share (common/reweight.h); then one warp chooses among the candidates.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/reweight.h"
#include "cuda/device_int.h"
#include "cuda/simt.h"

namespace tq {

// Reads with `size` lanes of a warp, a power of two; all lanes of the warp sum together.
struct LaneReader {
  int64_t rank;
  int64_t size;
};

TQ_DEVICE double sum_over(LaneReader reader, double value) {
  for (int mask = static_cast<int>(reader.size) / 2; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
  return value;
}

TQ_DEVICE double max_over(LaneReader reader, double value) {
  for (int mask = static_cast<int>(reader.size) / 2; mask > 0; mask /= 2) {
    const double other = simt::shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

template <typename Real>
using DeviceReweightJob = ReweightJob<Real, DeviceInt>;

// Lanes that share the roll-outs of a candidate.
TQ_HOST_DEVICE int lanes_a_candidate(int64_t n) {
  int lanes = 1;
  while (lanes < n && lanes < simt::kWarp) lanes *= 2;
  return lanes;
}

// `scores` [k] lies in shared memory.
template <typename Real>
TQ_DEVICE void score_candidates(const DeviceReweightJob<Real>& job, int64_t g, double* scores) {
  const int lanes = lanes_a_candidate(job.n);
  const LaneReader reader{simt::thread() % lanes, lanes};
  const int64_t at_once = simt::num_threads() / lanes;
  // Every lane goes through as many rounds, since all take part in the sums; those without a candidate of
  // their own read no roll-out.
  for (int64_t first = 0; first < job.k; first += at_once) {
    const int64_t z = first + simt::thread() / lanes;
    const bool is_own = z < job.k;
    const int64_t at = g * job.k + (is_own ? z : 0);
    int64_t valid = job.lengths == nullptr ? job.n : job.lengths[at];
    valid = !is_own ? 0 : valid < job.n ? valid : job.n;
    const CandidateValue value = value_candidate<Real>(
        job.rewards + at * job.n, job.log_weights == nullptr ? nullptr : job.log_weights + at * job.n, valid, job.alpha,
        job.is_soft, reader);
    if (!is_own || reader.rank != 0) continue;
    job.q[at] = static_cast<float>(value.q);
    job.q_stderr[at] = static_cast<float>(value.standard_error);
    job.ess[at] = static_cast<float>(value.ess);
    scores[z] = candidate_score(static_cast<double>(job.prior_logprobs[at]), value.q, job.alpha);
  }
}

// Makes the law of the candidates and the choice, by one warp.
template <typename Real>
TQ_DEVICE void choose_candidate(const DeviceReweightJob<Real>& job, int64_t g, const double* scores) {
  constexpr int kWarp = simt::kWarp;
  double peak = -INFINITY;
  for (int64_t z = simt::lane(); z < job.k; z += kWarp) peak = scores[z] > peak ? scores[z] : peak;
  peak = simt::warp_max(peak);
  double mass = 0.0;
  for (int64_t z = simt::lane(); z < job.k; z += kWarp) mass += scores[z] == -INFINITY ? 0.0 : ::exp(scores[z] - peak);
  // Where the peak is infinite, the mass is not a number, and the peak is the lse.
  const double log_mass = ::log(simt::warp_sum(mass));
  const double lse = peak == INFINITY ? peak : peak + log_mass;

  const int64_t key = job.keys == nullptr ? g : job.keys[g];
  const int64_t seed = read(job.seed);
  const int64_t step = read(job.step);
  double best_score = -INFINITY;
  int64_t best_id = INT64_MAX;
  int64_t best = 0;
  for (int64_t z = simt::lane(); z < job.k; z += kWarp) {
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
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const double score = simt::shuffle_xor(best_score, mask);
    const int64_t id = simt::shuffle_xor(best_id, mask);
    const int64_t z = simt::shuffle_xor(best, mask);
    const bool is_same = score == best_score && id == best_id;
    if (is_chosen_before(score, id, best_score, best_id) || (is_same && z < best)) {
      best_score = score;
      best_id = id;
      best = z;
    }
  }
  if (simt::lane() == 0) job.choice[g] = best;
}

template <typename Real>
TQ_DEVICE void reweight_prompt(const DeviceReweightJob<Real>& job) {
  auto* const scores = reinterpret_cast<double*>(simt::shared_memory());
  const int64_t g = simt::group_idx();
  score_candidates(job, g, scores);
  simt::sync_block();
  if (simt::thread() < simt::kWarp) choose_candidate(job, g, scores);
}

}  // namespace tq
