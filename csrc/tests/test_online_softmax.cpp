#include "common/online_softmax.h"

#include <cmath>

#include "tests/check.h"

namespace {

using State = tq::SoftmaxState<double>;

const State kEmpty = tq::empty_softmax_state<double>();

State of(double x) { return {x, 1.0}; }

void lse_of_merged_values_is_logsumexp() {
  const double values[] = {-1000.0, 3.0, 2.5, -700.0, 3.0};
  State state = kEmpty;
  double expected = 0.0;
  for (const double x : values) {
    state = tq::merge_softmax_states(state, of(x));
    expected += std::exp(x - 3.0);
  }
  CHECK(state.peak == 3.0);
  CHECK_CLOSE(tq::lse_of_softmax_state(state), 3.0 + std::log(expected), 1e-14);
}

void the_empty_set_is_neutral() {
  const State one = tq::merge_softmax_states(kEmpty, of(-5.0));
  CHECK(one.peak == -5.0 && one.sum == 1.0);
  const State none = tq::merge_softmax_states(kEmpty, kEmpty);
  CHECK(none.sum == 0.0 && tq::lse_of_softmax_state(none) == -INFINITY);
}

void merging_does_not_overflow() {
  const State state = tq::merge_softmax_states(of(1e300), of(-1e300));
  CHECK(tq::lse_of_softmax_state(state) == 1e300);
}

}  // namespace

int main() {
  lse_of_merged_values_is_logsumexp();
  the_empty_set_is_neutral();
  merging_does_not_overflow();
  return tq_test::num_failures();
}
