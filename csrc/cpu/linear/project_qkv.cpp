// project_qkv on CPU: the norm, three products over one packed x, and the rotation in place.
#include "cpu/linear/decoder_layer_rows.h"
#include "cpu/linear/linear_layers.h"

namespace tq {

namespace {

// With fewer rows than this, another thread does not pay for the work between the products.
constexpr int64_t kRowsPerThread = 32;

}  // namespace

std::tuple<Tensor, Tensor, Tensor> project_qkv_cpu(
    const Tensor& x_in, const Tensor& norm_in, double eps, const Tensor& q_weight, const std::optional<Tensor>& q_bias,
    const std::optional<Tensor>& q_scale, const Tensor& k_weight, const std::optional<Tensor>& k_bias,
    const std::optional<Tensor>& k_scale, const Tensor& v_weight, const std::optional<Tensor>& v_bias,
    const std::optional<Tensor>& v_scale, const Tensor& cos_in, const Tensor& sin_in) {
  const char* const op = "project_qkv";
  STD_TORCH_CHECK(x_in.dim() == 3 && cos_in.dim() == 3, op, ": x and cos must have 3 axes");
  const Tensor x = torch::stable::contiguous(x_in);
  const ScalarType dtype = x.scalar_type();
  const ElementType type = element_type_of(x, op, "x");
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  const int64_t batch = x.size(0), length = x.size(1), size = x.size(2), head_size = cos_in.size(2);
  const int64_t rows = batch * length;
  const Tensor norm = dense(norm_in, dtype);
  const Tensor cos = dense(cos_in, dtype);
  const Tensor sin = dense(sin_in, dtype);
  const LinearLayer q_layer(q_weight, q_bias, q_scale, size, dtype, op);
  const LinearLayer k_layer(k_weight, k_bias, k_scale, size, dtype, op);
  const LinearLayer v_layer(v_weight, v_bias, v_scale, size, dtype, op);
  STD_TORCH_CHECK(norm.numel() == size, op, ": norm_weight must have a number for each column of x");
  STD_TORCH_CHECK(
      head_size > 0 && head_size % 2 == 0 && q_layer.size_out() % head_size == 0 &&
          k_layer.size_out() % head_size == 0 && v_layer.size_out() == k_layer.size_out(),
      op, ": the weights must have whole heads of the size of cos");
  STD_TORCH_CHECK(
      cos.size(1) == length && (cos.size(0) == batch || cos.size(0) == 1) && sin.dim() == 3 &&
          sin.size(0) == cos.size(0) && sin.size(1) == length && sin.size(2) == head_size,
      op, ": cos and sin must be [N, T, d] or [1, T, d]");

  const int64_t q_heads = q_layer.size_out() / head_size;
  const int64_t kv_heads = k_layer.size_out() / head_size;
  Tensor normed = new_tensor({rows, size}, dtype);
  Tensor q = new_tensor({batch, length, q_heads, head_size}, dtype);
  Tensor k = new_tensor({batch, length, kv_heads, head_size}, dtype);
  Tensor v = new_tensor({batch, length, kv_heads, head_size}, dtype);
  const auto* const x_data = static_cast<const char*>(x.const_data_ptr());
  auto* const normed_data = static_cast<char*>(normed.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      TQ_SELECT_ISA(rms_norm_row)(
          type, x_data + row * size * bytes, norm.const_data_ptr(), static_cast<float>(eps), size,
          normed_data + row * size * bytes);
    }
  });
  auto* const q_data = static_cast<char*>(q.mutable_data_ptr());
  auto* const k_data = static_cast<char*>(k.mutable_data_ptr());
  run_linear_layers(
      normed_data, size, rows, size, type, {{q_layer, q_data}, {k_layer, k_data}, {v_layer, v.mutable_data_ptr()}});

  const auto* const cos_data = static_cast<const char*>(cos.const_data_ptr());
  const auto* const sin_data = static_cast<const char*>(sin.const_data_ptr());
  const int64_t angle_rows = cos.size(0) == 1 ? length : rows;
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t angle = row % angle_rows * head_size * bytes;
      for (const auto& [data, heads] : {std::pair{q_data, q_heads}, std::pair{k_data, kv_heads}}) {
        TQ_SELECT_ISA(rotate_row)(
            type, data + row * heads * head_size * bytes, cos_data + angle, sin_data + angle, heads, head_size);
      }
    }
  });
  return {q, k, v};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("project_qkv", TORCH_BOX(&project_qkv_cpu)); }

}  // namespace tq
