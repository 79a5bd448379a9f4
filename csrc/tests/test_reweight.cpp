#include "common/reweight.h"

#include <cmath>
#include <initializer_list>

#include "tests/check.h"

namespace {

tq::CandidateValue value(const double* rewards, const double* log_weights, int n, double alpha, bool is_soft) {
  return tq::value_candidate(rewards, log_weights, n, alpha, is_soft);
}

void equal_weights_give_mean_and_standard_error() {
  const double rewards[] = {1.0, 2.0, 6.0};
  const tq::CandidateValue v = value(rewards, nullptr, 3, 1.0, false);
  CHECK_CLOSE(v.q, 3.0, 1e-15);
  CHECK_CLOSE(v.standard_error, std::sqrt(14.0 / 2.0 / 3.0), 1e-15);
  CHECK_CLOSE(v.ess, 3.0, 1e-15);
}

void weights_are_normalised_and_a_shift_changes_nothing() {
  const double rewards[] = {1.0, 5.0};
  const double log_weights[] = {1000.0 + std::log(3.0), 1000.0};
  const tq::CandidateValue v = value(rewards, log_weights, 2, 1.0, false);
  CHECK_CLOSE(v.q, 2.0, 1e-12);
  CHECK_CLOSE(v.ess, 1.0 / (0.5625 + 0.0625), 1e-12);
}

void the_soft_estimator_lies_between_mean_and_maximum() {
  const double rewards[] = {0.0, 1.0, 1000.0};
  const tq::CandidateValue sharp = value(rewards, nullptr, 3, 0.01, true);
  CHECK_CLOSE(sharp.q, 1000.0 + 0.01 * std::log(1.0 / 3.0), 1e-9);
  const tq::CandidateValue flat = value(rewards, nullptr, 3, 1e9, true);
  CHECK_CLOSE(flat.q, 1001.0 / 3.0, 1e-3);
}

void weightless_rollouts_take_no_part_whatever_their_reward() {
  const double rewards[] = {2.0, NAN};
  const double log_weights[] = {0.0, -INFINITY};
  for (const bool is_soft : {false, true}) CHECK_CLOSE(value(rewards, log_weights, 2, 1.0, is_soft).q, 2.0, 1e-15);
}

void what_cannot_be_estimated_is_nan() {
  const double rewards[] = {2.0};
  const double impossible[] = {-INFINITY};
  CHECK(std::isnan(value(rewards, nullptr, 1, 1.0, false).standard_error));
  CHECK(std::isnan(value(rewards, nullptr, 0, 1.0, false).q));
  CHECK(std::isnan(value(rewards, impossible, 1, 1.0, false).q));
  CHECK(tq::candidate_score(-1.0, NAN, 1.0) == -INFINITY);
}

void the_larger_score_comes_first_and_then_the_lower_id() {
  CHECK(tq::is_chosen_before(2.0, 9, 1.0, 3));
  CHECK(tq::is_chosen_before(1.0, 3, 1.0, 9));
  CHECK(!tq::is_chosen_before(-INFINITY, 9, -INFINITY, 3));
}

}  // namespace

int main() {
  equal_weights_give_mean_and_standard_error();
  weights_are_normalised_and_a_shift_changes_nothing();
  the_soft_estimator_lies_between_mean_and_maximum();
  weightless_rollouts_take_no_part_whatever_their_reward();
  what_cannot_be_estimated_is_nan();
  the_larger_score_comes_first_and_then_the_lower_id();
  return tq_test::num_failures();
}
