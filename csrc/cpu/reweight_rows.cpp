#include "cpu/reweight_rows.h"

#include "common/reweight.h"
#include "cpu/philox_lanes.h"

namespace tq {
namespace TQ_ISA {

namespace {

constexpr double kNaN = __builtin_nan("");
constexpr double kInfinity = __builtin_inf();

TQ_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// to[i][lane] = from[lane * n + i] for `lanes` candidates of n roll-outs; 0 in the other lanes. `to` has
// room for a whole number of vectors, and what lies beyond n is not meant.
template <typename Real>
TQ_INLINE void load_rollouts(const Real* from, int64_t n, int64_t lanes, F64s* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = F64s{};
    for (int64_t lane = 0; lane < lanes; ++lane) to[i][lane] = static_cast<double>(from[lane * n + i]);
  }
}

#if defined(__AVX512F__)
TQ_INLINE void load_rollouts(const float* from, int64_t n, int64_t lanes, F64s* to) {
  for (int64_t first = 0; first < n; first += kWide) {
    const __mmask8 is_there = static_cast<__mmask8>((1u << smaller(n - first, kWide)) - 1u);
    __m256 r[8], t[8];
    for (int64_t lane = 0; lane < kWide; ++lane) {
      const float* const row = from + lane * n + first;
      r[lane] = _mm256_maskz_loadu_ps(lane < lanes ? is_there : __mmask8{0}, row);
    }
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      to[first + i] = (F64s)_mm512_cvtps_pd(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      to[first + i + 4] = (F64s)_mm512_cvtps_pd(_mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
}
#elif defined(__AVX2__)
TQ_INLINE void load_rollouts(const float* from, int64_t n, int64_t lanes, F64s* to) {
  const __m128i place = _mm_setr_epi32(0, 1, 2, 3);
  for (int64_t first = 0; first < n; first += kWide) {
    const __m128i is_there = _mm_cmpgt_epi32(_mm_set1_epi32(static_cast<int>(smaller(n - first, kWide))), place);
    __m128 r[4];
    for (int64_t lane = 0; lane < kWide; ++lane) {
      r[lane] = lane < lanes ? _mm_maskload_ps(from + lane * n + first, is_there) : _mm_setzero_ps();
    }
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    for (int i = 0; i < kWide; ++i) to[first + i] = (F64s)_mm256_cvtps_pd(r[i]);
  }
}
#endif

// What is known of the candidates in the lanes of one vector.
struct Candidates {
  F64s noise;
  F64s inverse_mass;  // 1 / the sum of the weights
  F64s q;
  F64s score;
};

// A prompt in the making. Each step below goes through all of its vectors before the next begins: what
// one vector waits for, a division or a logarithm, the others fill.
struct Prompt {
  int64_t vectors;
  int64_t n;
  // Vectors from the roll-outs of one vector of candidates to those of the next; the first n are meant.
  int64_t stride;
  Candidates* candidates;
  F64s* weights;
  F64s* rewards;
};

template <typename Real>
TQ_INLINE void make_noise(const ReweightJob<Real>& job, int64_t g, const Prompt& prompt) {
  const int64_t key = job.keys == nullptr ? g : job.keys[g];
  const PhiloxStream stream = philox_stream(job.seed, kPurposeChoice, key, job.step);
  for (int64_t v = 0; v < prompt.vectors; ++v) {
    const int64_t z = v * kWide;
    const I64s token_ids = load_integers(job.token_ids + g * job.k + z, smaller(job.k - z, kWide));
    prompt.candidates[v].noise = philox_uniforms(stream, token_ids);
  }
  // gumbel_from_uniform of common/gumbel.h.
  for (int twice = 0; twice < 2; ++twice) {
    for (int64_t v = 0; v < prompt.vectors; ++v) {
      prompt.candidates[v].noise = -log_of_normal(prompt.candidates[v].noise);
    }
  }
}

// How many roll-outs candidate z and the next ones have.
template <typename Real>
TQ_INLINE F64s load_counts(const ReweightJob<Real>& job, int64_t at, int64_t lanes) {
  if (job.lengths == nullptr) return broadcast_wide(job.n);
  const I64s lengths = load_integers(job.lengths + at, lanes);
  return __builtin_convertvector(lengths < job.n ? lengths : I64s{} + job.n, F64s);
}

// `then` in place of the numbers of roll-outs beyond `counts`.
TQ_INLINE void replace_missing(F64s* numbers, int64_t n, F64s counts, double then) {
  for (int64_t i = 0; i < n; ++i) {
    numbers[i] = counts > static_cast<double>(i) ? numbers[i] : broadcast_wide(then);
  }
}

// The weights, up to a factor: exp(log_weight - the candidate's largest), 0 where no roll-out is.
template <typename Real>
TQ_INLINE void make_weights(const ReweightJob<Real>& job, int64_t g, const Prompt& prompt) {
  for (int64_t v = 0; v < prompt.vectors; ++v) {
    F64s* const weights = prompt.weights + v * prompt.stride;
    if (job.log_weights == nullptr) {
      for (int64_t i = 0; i < prompt.n; ++i) weights[i] = broadcast_wide(1.0);
      continue;
    }
    const int64_t at = g * job.k + v * kWide;
    const int64_t lanes = smaller(job.k - v * kWide, kWide);
    load_rollouts(job.log_weights + at * job.n, job.n, lanes, weights);
    if (job.lengths != nullptr) replace_missing(weights, prompt.n, load_counts(job, at, lanes), -kInfinity);
    F64s peak = broadcast_wide(-kInfinity);
    for (int64_t i = 0; i < prompt.n; ++i) peak = wide_max_or_second(weights[i], peak);
    for (int64_t i = 0; i < prompt.n; ++i) weights[i] -= peak;
  }
  for (int64_t v = 0; v < prompt.vectors; ++v) {
    F64s* const weights = prompt.weights + v * prompt.stride;
    for (int64_t i = 0; job.log_weights != nullptr && i < prompt.n; ++i) weights[i] = exp_nonpositive(weights[i]);
    if (job.lengths == nullptr) continue;
    // Once more: where all log-weights are -inf, what came of them is not a number.
    const int64_t lanes = smaller(job.k - v * kWide, kWide);
    replace_missing(weights, prompt.n, load_counts(job, g * job.k + v * kWide, lanes), 0.0);
  }
}

// Q and the score of every candidate of prompt g, as value_candidate of common/reweight.h has them: a
// roll-out of weight 0 takes no part, whatever its reward. The score is -inf beyond the k.
template <bool kIsSoft, typename Real>
TQ_INLINE void score_candidates(const ReweightJob<Real>& job, int64_t g, const Prompt& prompt) {
  const F64s zero = {};
  for (int64_t v = 0; v < prompt.vectors; ++v) {
    const int64_t at = g * job.k + v * kWide;
    const int64_t lanes = smaller(job.k - v * kWide, kWide);
    const F64s* const weights = prompt.weights + v * prompt.stride;
    F64s* const rewards = prompt.rewards + v * prompt.stride;
    load_rollouts(job.rewards + at * job.n, job.n, lanes, rewards);
    F64s mass = {}, mass_of_squares = {}, total = {};
    F64s top = broadcast_wide(-kInfinity);
    for (int64_t i = 0; i < prompt.n; ++i) {
      const F64s weight = weights[i];
      const F64s reward = weight == zero ? zero : rewards[i];
      rewards[i] = reward;
      mass += weight;
      mass_of_squares += weight * weight;
      if (!kIsSoft) total += weight * reward;
      if (kIsSoft) top = weight > zero ? wide_max_or_second(reward, top) : top;
    }
    for (int64_t i = 0; kIsSoft && i < prompt.n; ++i) {
      const F64s below = weights[i] == zero ? zero : rewards[i] - top;
      total += weights[i] * exp_nonpositive(below / job.alpha);
    }
    // One division for both: neither sum is above n, nor below 1 unless there is no weight at all.
    const F64s inverse_of_both = 1.0 / (mass * mass_of_squares);
    const F64s inverse_mass = inverse_of_both * mass_of_squares;
    F64s q = total * inverse_mass;
    for (int lane = 0; kIsSoft && lane < kWide; ++lane) q[lane] = top[lane] + job.alpha * __builtin_log(q[lane]);
    const F64s score = load_doubles(job.prior_logprobs + at, lanes) + q / job.alpha;
    prompt.candidates[v].inverse_mass = inverse_mass;
    prompt.candidates[v].q = q;
    prompt.candidates[v].score = score == score ? score : broadcast_wide(-kInfinity);
    store_floats(job.q + at, q, lanes);
    store_floats(job.ess + at, mass * mass * (inverse_of_both * mass), lanes);
  }
  for (int64_t z = job.k; z % kWide != 0; ++z) prompt.candidates[z / kWide].score[z % kWide] = -kInfinity;
}

// The standard error of every Q of prompt g.
template <bool kIsSoft, typename Real>
TQ_INLINE void estimate_errors(const ReweightJob<Real>& job, int64_t g, const Prompt& prompt) {
  const F64s zero = {};
  const double n = static_cast<double>(job.n);
  F64s correction = broadcast_wide(job.n > 1 ? n / (n - 1.0) : kNaN);
  for (int64_t v = 0; v < prompt.vectors; ++v) {
    const int64_t at = g * job.k + v * kWide;
    const int64_t lanes = smaller(job.k - v * kWide, kWide);
    if (job.lengths != nullptr) {
      const F64s counts = load_counts(job, at, lanes);
      correction = counts > 1.0 ? counts / (counts - 1.0) : broadcast_wide(kNaN);
    }
    const F64s q = prompt.candidates[v].q;
    F64s spread = {};
    for (int64_t i = 0; i < prompt.n; ++i) {
      const F64s weight = prompt.weights[v * prompt.stride + i];
      F64s deviation = prompt.rewards[v * prompt.stride + i] - q;
      if (kIsSoft) deviation = job.alpha * expm1_of(deviation / job.alpha);
      const F64s term = weight * deviation;
      spread += weight == zero ? zero : term * term;
    }
    store_floats(job.q_stderr + at, square_root(correction * spread) * prompt.candidates[v].inverse_mass, lanes);
  }
}

TQ_INLINE double largest_score(const Prompt& prompt) {
  F64s largest = prompt.candidates[0].score;
  for (int64_t v = 1; v < prompt.vectors; ++v) largest = wide_max_or_second(prompt.candidates[v].score, largest);
  return reduce_max(largest);
}

// The final log-probs of prompt g; the scores get their noise.
template <typename Real>
TQ_INLINE void finish_scores(const ReweightJob<Real>& job, int64_t g, const Prompt& prompt) {
  const double peak = largest_score(prompt);
  F64s masses = {};
  for (int64_t v = 0; v < prompt.vectors; ++v) masses += exp_nonpositive(prompt.candidates[v].score - peak);
  // The sum is at least 1, or not a number where the peak is infinite: then the peak is the lse.
  const F64s log_mass = log_of_normal(broadcast_wide(reduce_sum(masses)));
  const F64s lse = __builtin_isinf(peak) ? broadcast_wide(peak) : log_mass + peak;
  for (int64_t v = 0; v < prompt.vectors; ++v) {
    const F64s score = prompt.candidates[v].score;
    const F64s logprob = score == -kInfinity ? score : score - lse;
    store_floats(job.final_logprobs + g * job.k + v * kWide, logprob, smaller(job.k - v * kWide, kWide));
    if (!job.is_greedy) prompt.candidates[v].score = score + prompt.candidates[v].noise;
  }
}

// The first of the candidates that none is chosen before (is_chosen_before of common/reweight.h).
TQ_INLINE int64_t choose_candidate(const Prompt& prompt, const int64_t* token_ids, int64_t k) {
  constexpr int64_t kVectors = 64 / kWide;
  const F64s peak = broadcast_wide(largest_score(prompt));
  int64_t best = -1;
  for (int64_t first = 0; first < prompt.vectors; first += kVectors) {
    // Sixty-four at a time: which vector has the largest is a branch that nobody could predict.
    uint64_t left = 0;
    const int64_t count = smaller(prompt.vectors - first, kVectors);
    for (int64_t v = 0; v < count; ++v) {
      left |= static_cast<uint64_t>(mask_equal(prompt.candidates[first + v].score, peak)) << (v * kWide);
    }
    for (; left != 0; left &= left - 1) {
      const int64_t z = first * kWide + __builtin_ctzll(left);
      if (best < 0 || (z < k && token_ids[z] < token_ids[best])) best = z;
    }
  }
  return best;
}

// Asks for the roll-outs of prompt g, which is worked on some hundred nanoseconds later. Of a large one the
// beginning: the processor sees by itself how it goes on.
template <typename Real>
TQ_INLINE void prefetch_rollouts(const ReweightJob<Real>& job, int64_t g) {
  if (g >= job.prompts) return;
  const int64_t size = job.k * job.n;
  for (int64_t i = 0; i < smaller(size, 1024); i += 64 / sizeof(Real)) {
    __builtin_prefetch(job.rewards + g * size + i);
    if (job.log_weights != nullptr) __builtin_prefetch(job.log_weights + g * size + i);
  }
}

template <typename Real>
TQ_INLINE void reweight_prompts(const ReweightJob<Real>& job, int64_t begin, int64_t end, double* room) {
  const int64_t vectors = (job.k + kWide - 1) / kWide;
  const int64_t stride = rounded_up(job.n);
  Candidates* const candidates = reinterpret_cast<Candidates*>(room);
  F64s* const weights = reinterpret_cast<F64s*>(candidates + vectors);
  const Prompt prompt{vectors, job.n, stride, candidates, weights, weights + vectors * stride};
  prefetch_rollouts(job, begin);
  prefetch_rollouts(job, begin + 1);
  for (int64_t g = begin; g < end; ++g) {
    prefetch_rollouts(job, g + 2);
    if (!job.is_greedy) make_noise(job, g, prompt);
    make_weights(job, g, prompt);
    if (job.is_soft) {
      score_candidates<true>(job, g, prompt);
      estimate_errors<true>(job, g, prompt);
    } else {
      score_candidates<false>(job, g, prompt);
      estimate_errors<false>(job, g, prompt);
    }
    finish_scores(job, g, prompt);
    job.choice[g] = choose_candidate(prompt, job.token_ids + g * job.k, job.k);
  }
}

}  // namespace

void reweight_floats(const ReweightJob<float>& job, int64_t begin, int64_t end, double* room) {
  reweight_prompts(job, begin, end, room);
}

void reweight_doubles(const ReweightJob<double>& job, int64_t begin, int64_t end, double* room) {
  reweight_prompts(job, begin, end, room);
}

}  // namespace TQ_ISA
}  // namespace tq
