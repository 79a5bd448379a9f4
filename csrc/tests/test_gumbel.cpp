#include "common/gumbel.h"

#include <cmath>

#include "tests/check.h"

namespace {

void noise_is_finite_at_both_ends() {
  CHECK(std::isfinite(tq::gumbel_from_uniform(0x1p-54)));
  CHECK(std::isfinite(tq::gumbel_from_uniform(1.0 - 0x1p-53)));
  // The upper tail reaches as far as 53 bits allow: -log(2^-53) = 36.7.
  CHECK(tq::gumbel_from_uniform(1.0 - 0x1p-53) > 36.0);
}

void noise_has_the_mean_and_variance_of_a_gumbel() {
  constexpr int kDraws = 200000;
  double sum = 0.0;
  double sum_of_squares = 0.0;
  for (int i = 0; i < kDraws; ++i) {
    const double g = tq::choice_gumbel(11, 5, 3, i);
    sum += g;
    sum_of_squares += g * g;
  }
  const double mean = sum / kDraws;
  CHECK_CLOSE(mean, 0.5772156649, 5 * 2.9e-3);
  CHECK_CLOSE(sum_of_squares / kDraws - mean * mean, 1.6449340668, 5 * 7.8e-3);
}

}  // namespace

int main() {
  noise_is_finite_at_both_ends();
  noise_has_the_mean_and_variance_of_a_gumbel();
  return tq_test::num_failures();
}
