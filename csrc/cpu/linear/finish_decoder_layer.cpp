// finish_decoder_layer on CPU: all that follows attention in a layer.
#include "cpu/linear/decoder_layer.h"

namespace tq {

Tensor finish_decoder_layer_cpu(
    const Tensor& attended_in, const Tensor& residual_in, const Tensor& o_weight, const std::optional<Tensor>& o_bias,
    const std::optional<Tensor>& o_scale, const Tensor& norm_in, double eps, const Tensor& gate_weight,
    const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& gate_scale, const Tensor& up_weight,
    const std::optional<Tensor>& up_bias, const std::optional<Tensor>& up_scale, const Tensor& down_weight,
    const std::optional<Tensor>& down_bias, const std::optional<Tensor>& down_scale) {
  const char* const op = "finish_decoder_layer";
  STD_TORCH_CHECK(attended_in.dim() == 3 && residual_in.dim() == 3, op, ": attended and residual must have 3 axes");
  const Tensor residual = torch::stable::contiguous(residual_in);
  const ScalarType dtype = residual.scalar_type();
  const Tensor attended = dense(attended_in, dtype);
  const int64_t size = residual.size(2);
  const LinearLayer gate(gate_weight, gate_bias, gate_scale, size, dtype, op);
  const FinishWeights weights(
      LinearLayer(o_weight, o_bias, o_scale, attended.size(2), dtype, op), norm_in, eps, gate,
      LinearLayer(up_weight, up_bias, up_scale, size, dtype, op),
      LinearLayer(down_weight, down_bias, down_scale, gate.size_out(), dtype, op));
  return finish(op, attended, residual, weights);
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("finish_decoder_layer", TORCH_BOX(&finish_decoder_layer_cpu)); }

}  // namespace tq
