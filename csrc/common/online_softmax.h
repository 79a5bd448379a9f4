// The running (peak, sum of exp(x - peak)) of a set of values, and the merge of two of them.
//
// (-inf, 0) is the empty set. Callers turn NaN into -inf first.
#pragma once

#include <cmath>

#include "common/platform.h"

namespace tq {

template <typename Real>
struct SoftmaxState {
  Real peak;
  Real sum;
};

template <typename Real>
TQ_HOST_DEVICE SoftmaxState<Real> empty_softmax_state() {
  return {static_cast<Real>(-INFINITY), static_cast<Real>(0)};
}

// The sum of `state` relative to another peak; the empty set adds nothing to any.
template <typename Real>
TQ_HOST_DEVICE Real sum_at_peak(SoftmaxState<Real> state, Real peak) {
  return state.peak == static_cast<Real>(-INFINITY) ? static_cast<Real>(0)
                                                    : state.sum * static_cast<Real>(::exp(state.peak - peak));
}

template <typename Real>
TQ_HOST_DEVICE SoftmaxState<Real> merge_softmax_states(SoftmaxState<Real> a, SoftmaxState<Real> b) {
  const Real peak = a.peak > b.peak ? a.peak : b.peak;
  return {peak, sum_at_peak(a, peak) + sum_at_peak(b, peak)};
}

template <typename Real>
TQ_HOST_DEVICE Real lse_of_softmax_state(SoftmaxState<Real> state) {
  return state.sum > static_cast<Real>(0) ? state.peak + static_cast<Real>(::log(state.sum))
                                          : static_cast<Real>(-INFINITY);
}

}  // namespace tq
