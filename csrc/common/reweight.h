// Steps 5 to 7 of Transfer Q* (arXiv 2405.20495, Algorithm 1): the rewards of roll-outs become the
// value of each candidate, its score, and the next token. Everything inside is float64.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/gumbel.h"
#include "common/platform.h"

namespace tq {

// The operands of reweight_sample: dense arrays of the contract (tq_fast/ops/reweight_sample.py); optional
// ones may be null. `Integer` is how seed and step are read.
template <typename Real, typename Integer = int64_t>
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
  Integer seed;
  Integer step;
  int64_t* choice;
  float* final_logprobs;
  float* q;
  float* q_stderr;
  float* ess;
};

struct CandidateValue {
  double q;               // in units of the reward; NaN without a roll-out of any weight
  double standard_error;  // of q; NaN for fewer than two roll-outs
  double ess;             // 1 / sum of squared weights
};

// The readers of a candidate's roll-outs: reader `rank` of `size` takes roll-outs rank, rank + size, ... On
// the host one thread reads all; on CUDA some lanes of a warp share them.
struct OneReader {
  static constexpr int64_t rank = 0;
  static constexpr int64_t size = 1;
};
TQ_HOST_DEVICE double sum_over(OneReader, double value) { return value; }
TQ_HOST_DEVICE double max_over(OneReader, double value) { return value; }

template <typename Real, typename Reader = OneReader>
TQ_HOST_DEVICE double largest_of(const Real* numbers, int64_t n, Reader reader = {}) {
  double largest = -INFINITY;
  for (int64_t i = reader.rank; i < n; i += reader.size) {
    const double number = static_cast<double>(numbers[i]);
    largest = number > largest ? number : largest;
  }
  return max_over(reader, largest);
}

// The weights of n roll-outs of one candidate, up to a factor: exp(log_weight - the largest of them).
template <typename Real>
struct LogWeights {
  const Real* log_weights;
  double largest;
};

template <typename Real>
TQ_HOST_DEVICE double weight_at(const LogWeights<Real>& weights, int64_t i) {
  return ::exp(static_cast<double>(weights.log_weights[i]) - weights.largest);
}

// Weights that were computed before; null: all roll-outs weigh the same.
struct RolloutWeights {
  const double* weights;
};

TQ_HOST_DEVICE double weight_at(const RolloutWeights& weights, int64_t i) {
  return weights.weights == nullptr ? 1.0 : weights.weights[i];
}

// The value of one candidate from its n roll-outs, whose weights are normalised within it; NaN where
// no roll-out has any weight, since 0/0 is. is_soft: q = alpha log sum w exp(r / alpha), else sum w r.
template <typename Real, typename Weights, typename Reader = OneReader>
TQ_HOST_DEVICE CandidateValue
value_weighted(const Real* rewards, const Weights& weights, int64_t n, double alpha, bool is_soft, Reader reader = {}) {
  double mass = 0.0;
  double mass_of_squares = 0.0;
  double top = -INFINITY;
  for (int64_t i = reader.rank; i < n; i += reader.size) {
    const double w = weight_at(weights, i);
    mass += w;
    mass_of_squares += w * w;
    const double r = static_cast<double>(rewards[i]);
    if (w > 0.0 && r > top) top = r;
  }
  mass = sum_over(reader, mass);
  mass_of_squares = sum_over(reader, mass_of_squares);
  top = max_over(reader, top);

  // A roll-out of weight 0 takes no part whatever its reward, here and in the spread below.
  double total = 0.0;
  for (int64_t i = reader.rank; i < n; i += reader.size) {
    const double w = weight_at(weights, i);
    if (w == 0.0) continue;
    const double r = static_cast<double>(rewards[i]);
    total += w * (is_soft ? ::exp((r - top) / alpha) : r);
  }
  const double mean = sum_over(reader, total) / mass;
  const double q = is_soft ? top + alpha * ::log(mean) : mean;

  double spread = 0.0;
  for (int64_t i = reader.rank; i < n; i += reader.size) {
    const double w = weight_at(weights, i);
    if (w == 0.0) continue;
    const double deviation = static_cast<double>(rewards[i]) - q;
    const double term = w * (is_soft ? alpha * ::expm1(deviation / alpha) : deviation);
    spread += term * term;
  }
  spread = sum_over(reader, spread);
  const double count = static_cast<double>(n);
  const double standard_error = n > 1 ? ::sqrt(count / (count - 1.0) * spread) / mass : static_cast<double>(NAN);
  return {q, standard_error, mass * mass / mass_of_squares};
}

// The value of one candidate from log-weights, which may be null: then all roll-outs weigh the same.
template <typename Real, typename Reader = OneReader>
TQ_HOST_DEVICE CandidateValue value_candidate(
    const Real* rewards, const Real* log_weights, int64_t n, double alpha, bool is_soft, Reader reader = {}) {
  if (log_weights == nullptr) return value_weighted(rewards, RolloutWeights{nullptr}, n, alpha, is_soft, reader);
  const LogWeights<Real> weights{log_weights, largest_of(log_weights, n, reader)};
  return value_weighted(rewards, weights, n, alpha, is_soft, reader);
}

// log prior + Q / alpha; a candidate whose score is not a number counts as impossible.
TQ_HOST_DEVICE double candidate_score(double prior_logprob, double q, double alpha) {
  const double score = prior_logprob + q / alpha;
  return score == score ? score : -INFINITY;
}

// Whether candidate a is chosen before candidate b: the larger score, then the lower token id.
TQ_HOST_DEVICE bool is_chosen_before(double score_a, int64_t id_a, double score_b, int64_t id_b) {
  return score_a > score_b || (score_a == score_b && id_a < id_b);
}

}  // namespace tq
