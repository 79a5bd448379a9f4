// Shared by the two trajectory ops: the positions that count, and the log-probability of one token.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/online_softmax.h"
#include "cpu/tensors/contract.h"
#include "cpu/tensors/tensor_access.h"

namespace tq {

// tokens [N, T] and lengths [N] as dense int64.
struct Trajectories {
  Tensor tokens_tensor;
  Tensor lengths_tensor;
  const int64_t* tokens;
  const int64_t* lengths;
  int64_t rows;
  int64_t length;

  Trajectories(const Tensor& tokens_in, const Tensor& lengths_in)
      : tokens_tensor(dense(tokens_in, ScalarType::Long)),
        lengths_tensor(dense(lengths_in, ScalarType::Long)),
        tokens(static_cast<const int64_t*>(tokens_tensor.const_data_ptr())),
        lengths(static_cast<const int64_t*>(lengths_tensor.const_data_ptr())),
        rows(tokens_in.size(0)),
        length(tokens_in.size(1)) {}

  // Whether tokens and lengths fit the states or logits `of` [N, T, ...].
  static bool are(const Tensor& tokens, const Tensor& lengths, const Tensor& of) {
    return of.dim() == 3 && is_integers(tokens, {of.size(0), of.size(1)}) && is_integers(lengths, {of.size(0)});
  }

  bool counts(int64_t row, int64_t t) const { return t < lengths[row]; }

  // out[row] = the sum over the positions that count of terms[row * length + t], in order.
  Tensor sum_rows(const double* terms) const {
    Tensor out = new_tensor({rows}, ScalarType::Float);
    auto* const data = static_cast<float*>(out.mutable_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0.0;
      for (int64_t t = 0; t < length && counts(row, t); ++t) sum += terms[row * length + t];
      data[row] = static_cast<float>(sum);
    }
    return out;
  }
};

// The log-softmax of a token whose logit is `value`; NaN where the row has no distribution.
static inline double token_logprob(double value, SoftmaxState<double> state) {
  if (!(state.sum > 0.0) || std::isinf(state.peak)) return std::numeric_limits<double>::quiet_NaN();
  return value - state.peak - std::log(state.sum);
}

}  // namespace tq
