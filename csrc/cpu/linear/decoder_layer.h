// The two halves of a decoder layer of Llama's formula, before and after its attention.
#pragma once

#include "cpu/linear/linear_layers.h"

namespace tq {

// What project_qkv multiplies by. q, k and v read the same normed rows.
struct QkvWeights {
  Tensor norm;
  double eps;
  LinearLayer q, k, v;

  QkvWeights(
      const Tensor& norm_in, double eps_in, const LinearLayer& q_in, const LinearLayer& k_in, const LinearLayer& v_in)
      : norm(dense(norm_in, q_in.dtype)), eps(eps_in), q(q_in), k(k_in), v(v_in) {}
};

struct QueriesKeysValues {
  Tensor q, k, v;  // [N, T, heads, d]
};

// x [N, T, D], dense, through the norm and three products, q and k rotated by cos and sin, [N, T, d] or
// [1, T, d], dense. What does not fit is refused in the name of `op`.
QueriesKeysValues project(
    const char* op, const Tensor& x, const QkvWeights& weights, const Tensor& cos, const Tensor& sin);

// What finish_decoder_layer multiplies by.
struct FinishWeights {
  LinearLayer o;
  Tensor norm;
  double eps;
  LinearLayer gate, up, down;

  FinishWeights(
      const LinearLayer& o_in, const Tensor& norm_in, double eps_in, const LinearLayer& gate_in,
      const LinearLayer& up_in, const LinearLayer& down_in)
      : o(o_in), norm(dense(norm_in, o_in.dtype)), eps(eps_in), gate(gate_in), up(up_in), down(down_in) {}
};

// attended [N, T, A] and residual [N, T, D], dense, to the next residual stream [N, T, D]. What does not fit
// is refused in the name of `op`.
Tensor finish(const char* op, const Tensor& attended, const Tensor& residual, const FinishWeights& weights);

// weight * x / sqrt(mean(x^2) + eps) for each of the rows of x [rows, size], dense.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);

}  // namespace tq
