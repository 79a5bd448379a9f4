// The CUDA kernel of reweight_sample, run on the CPU (tests/simt_on_host.h), against the one-thread maths.
#include "cuda/reweight_prompt.h"

#include <cmath>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

struct Problem {
  std::vector<double> prior, rewards, log_weights;
  std::vector<int64_t> ids, lengths;
  int64_t prompts, k, n;
};

Problem random_problem(int64_t prompts, int64_t k, int64_t n) {
  std::mt19937 engine(static_cast<unsigned>(k * 100 + n));
  std::normal_distribution<double> normal;
  Problem problem{{}, {}, {}, {}, {}, prompts, k, n};
  for (int64_t i = 0; i < prompts * k; ++i) {
    problem.prior.push_back(normal(engine));
    problem.ids.push_back(static_cast<int64_t>(engine() % 1000));
    problem.lengths.push_back(static_cast<int64_t>(engine() % (n + 1)));
  }
  for (int64_t i = 0; i < prompts * k * n; ++i) {
    problem.rewards.push_back(normal(engine));
    problem.log_weights.push_back(engine() % 5 == 0 ? -INFINITY : 3.0 * normal(engine));
  }
  return problem;
}

// Makes the choice from scores, in the plainest way.
int64_t choose(const std::vector<double>& scores, const int64_t* ids, int64_t g, bool is_greedy) {
  int64_t best = -1;
  double best_score = 0.0;
  for (int64_t z = 0; z < static_cast<int64_t>(scores.size()); ++z) {
    const double noisy = is_greedy ? scores[z] : scores[z] + tq::choice_gumbel(9, g, 4, ids[z]);
    if (best < 0 || tq::is_chosen_before(noisy, ids[z], best_score, ids[best])) {
      best = z;
      best_score = noisy;
    }
  }
  return best;
}

void check(const Problem& problem, bool is_soft, bool is_greedy, bool has_weights, bool has_lengths, int threads) {
  const int64_t count = problem.prompts * problem.k;
  const int64_t step = 4;
  std::vector<int64_t> choice(problem.prompts, -1);
  std::vector<float> final_logprobs(count), q(count), q_stderr(count), ess(count);
  const tq::DeviceReweightJob<double> job{
      problem.prior.data(),
      problem.ids.data(),
      problem.rewards.data(),
      has_weights ? problem.log_weights.data() : nullptr,
      has_lengths ? problem.lengths.data() : nullptr,
      nullptr,
      problem.prompts,
      problem.k,
      problem.n,
      0.6,
      is_soft,
      is_greedy,
      {9, nullptr},
      {0, &step},
      choice.data(),
      final_logprobs.data(),
      q.data(),
      q_stderr.data(),
      ess.data()};
  tq::simt::launch_on_host(problem.prompts, 1, threads, problem.k * sizeof(double), [&] { tq::reweight_prompt(job); });
  for (int64_t g = 0; g < problem.prompts; ++g) {
    std::vector<double> scores;
    double mass = 0.0;
    for (int64_t z = 0; z < problem.k; ++z) {
      const int64_t at = g * problem.k + z;
      const tq::CandidateValue value = tq::value_candidate(
          job.rewards + at * problem.n, has_weights ? job.log_weights + at * problem.n : nullptr,
          has_lengths ? problem.lengths[at] : problem.n, job.alpha, is_soft);
      CHECK_CLOSE(q[at], value.q, 1e-5);
      CHECK_CLOSE(q_stderr[at], value.standard_error, 1e-5);
      CHECK_CLOSE(ess[at], value.ess, 1e-5 * problem.n);
      scores.push_back(tq::candidate_score(problem.prior[at], value.q, job.alpha));
      mass += std::exp(scores.back());
    }
    for (int64_t z = 0; z < problem.k; ++z) {
      const double expected = scores[z] == -INFINITY ? scores[z] : scores[z] - std::log(mass);
      CHECK_CLOSE(final_logprobs[g * problem.k + z], expected, 1e-5);
    }
    CHECK(choice[g] == choose(scores, job.token_ids + g * problem.k, g, is_greedy));
  }
}

}  // namespace

int main() {
  for (const auto& [k, n] : {std::pair<int64_t, int64_t>{1, 1}, {20, 8}, {5, 3}, {7, 70}, {90, 2}}) {
    const Problem problem = random_problem(2, k, n);
    for (int choice = 0; choice < 16; ++choice) {
      check(problem, choice & 1, choice & 2, choice & 4, choice & 8, choice % 3 == 0 ? 32 : 96);
    }
  }
  Problem infinite = random_problem(2, 20, 8);
  infinite.prior[7] = INFINITY;
  for (int choice = 0; choice < 4; ++choice) check(infinite, choice & 1, choice & 2, true, false, 96);
  return tq_test::num_failures();
}
