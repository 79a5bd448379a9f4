// finish_decoder_layer on CPU: all that follows attention in a layer.
#include "cpu/linear/decoder_layer_rows.h"
#include "cpu/linear/linear_layers.h"

namespace tq {

namespace {

// With fewer rows than this, another thread does not pay for the work between the products.
constexpr int64_t kRowsPerThread = 32;

}  // namespace

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
  const ElementType type = element_type_of(residual, op, "residual");
  const Tensor attended = dense(attended_in, dtype);
  const int64_t bytes = static_cast<int64_t>(residual.element_size());
  const int64_t rows = residual.size(0) * residual.size(1), size = residual.size(2);
  const int64_t attended_size = attended.size(2);
  STD_TORCH_CHECK(
      attended.size(0) == residual.size(0) && attended.size(1) == residual.size(1), op,
      ": attended must have the rows of residual");
  const Tensor norm = dense(norm_in, dtype);
  const LinearLayer o_layer(o_weight, o_bias, o_scale, attended_size, dtype, op);
  const LinearLayer gate_layer(gate_weight, gate_bias, gate_scale, size, dtype, op);
  const LinearLayer up_layer(up_weight, up_bias, up_scale, size, dtype, op);
  const int64_t inner = gate_layer.size_out();
  const LinearLayer down_layer(down_weight, down_bias, down_scale, inner, dtype, op);
  STD_TORCH_CHECK(
      norm.numel() == size && o_layer.size_out() == size && down_layer.size_out() == size &&
          up_layer.size_out() == inner,
      op, ": the weights must lead from the columns of residual back to them");

  Tensor out = new_tensor({residual.size(0), residual.size(1), size}, dtype);
  Tensor room = new_tensor({2, rows, std::max(size, inner)}, dtype);
  const auto* const residual_data = static_cast<const char*>(residual.const_data_ptr());
  auto* const out_data = static_cast<char*>(out.mutable_data_ptr());
  auto* const first = static_cast<char*>(room.mutable_data_ptr());
  auto* const second = first + rows * std::max(size, inner) * bytes;

  run_linear_layers(attended.const_data_ptr(), attended_size, rows, attended_size, type, {{o_layer, first}});
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * size * bytes;
      TQ_SELECT_ISA(add_row)(type, residual_data + at, first + at, size, out_data + at);
      TQ_SELECT_ISA(rms_norm_row)(
          type, out_data + at, norm.const_data_ptr(), static_cast<float>(eps), size, first + at);
    }
  });
  Tensor gated = new_tensor({rows, inner}, dtype);
  auto* const gated_data = static_cast<char*>(gated.mutable_data_ptr());
  run_linear_layers(first, size, rows, size, type, {{gate_layer, gated_data}, {up_layer, second}});
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * inner * bytes;
    TQ_SELECT_ISA(silu_mul_row)(type, gated_data + at, second + at, (end - begin) * inner, gated_data + at);
  });
  run_linear_layers(gated_data, inner, rows, inner, type, {{down_layer, first}});
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size * bytes;
    TQ_SELECT_ISA(add_row)(type, out_data + at, first + at, (end - begin) * size, out_data + at);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("finish_decoder_layer", TORCH_BOX(&finish_decoder_layer_cpu)); }

}  // namespace tq
