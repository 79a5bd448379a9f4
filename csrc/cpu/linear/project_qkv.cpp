// project_qkv on CPU: the norm, three products over one packed x, and the rotation in place.
#include "cpu/linear/decoder_layer.h"

namespace tq {

std::tuple<Tensor, Tensor, Tensor> project_qkv_cpu(
    const Tensor& x_in, const Tensor& norm_in, double eps, const Tensor& q_weight, const std::optional<Tensor>& q_bias,
    const std::optional<Tensor>& q_scale, const Tensor& k_weight, const std::optional<Tensor>& k_bias,
    const std::optional<Tensor>& k_scale, const Tensor& v_weight, const std::optional<Tensor>& v_bias,
    const std::optional<Tensor>& v_scale, const Tensor& cos_in, const Tensor& sin_in) {
  const char* const op = "project_qkv";
  STD_TORCH_CHECK(x_in.dim() == 3, op, ": x must have 3 axes");
  const Tensor x = torch::stable::contiguous(x_in);
  const ScalarType dtype = x.scalar_type();
  const int64_t size = x.size(2);
  const Tensor cos = dense(cos_in, dtype);
  const Tensor sin = dense(sin_in, dtype);
  const QkvWeights weights(
      norm_in, eps, LinearLayer(q_weight, q_bias, q_scale, size, dtype, op),
      LinearLayer(k_weight, k_bias, k_scale, size, dtype, op), LinearLayer(v_weight, v_bias, v_scale, size, dtype, op));
  QueriesKeysValues result = project(op, x, weights, cos, sin);
  return {result.q, result.k, result.v};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("project_qkv", TORCH_BOX(&project_qkv_cpu)); }

}  // namespace tq
