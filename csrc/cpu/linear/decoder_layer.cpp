// What a decoder layer of Llama's formula does before and after its attention, rounded where the modules of
// transformers round.
#include "cpu/linear/decoder_layer.h"

#include "cpu/linear/decoder_layer_rows.h"

namespace tq {

namespace {

// With fewer rows than this, another thread does not pay for the work between the products.
constexpr int64_t kRowsPerThread = 32;

// Rotates the heads of each row of x [N, T, heads, d] in place.
void rotate(Tensor& x, ElementType type, const Tensor& cos, const Tensor& sin) {
  const int64_t length = x.size(1), rows = x.size(0) * length, heads = x.size(2), head_size = x.size(3);
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  auto* const data = static_cast<char*>(x.mutable_data_ptr());
  const auto* const cos_data = static_cast<const char*>(cos.const_data_ptr());
  const auto* const sin_data = static_cast<const char*>(sin.const_data_ptr());
  const int64_t angle_rows = cos.size(0) == 1 ? length : rows;
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t angle = row % angle_rows * head_size * bytes;
      TQ_SELECT_ISA(rotate_row)(
          type, data + row * heads * head_size * bytes, cos_data + angle, sin_data + angle, heads, head_size);
    }
  });
}

// Calls run(begin, end) for elements of a tensor of `rows` rows of `size` elements, on threads.
template <typename Run>
void for_elements(int64_t rows, int64_t size, const Run& run) {
  torch::stable::parallel_for(
      0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) { run(begin * size, (end - begin) * size); });
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const ElementType type = element_type_of(x, "rms_norm", "x");
  const int64_t rows = x.size(0), size = x.size(1), bytes = static_cast<int64_t>(x.element_size());
  Tensor out = new_tensor({rows, size}, x.scalar_type());
  const auto* const from = static_cast<const char*>(x.const_data_ptr());
  auto* const to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * size * bytes;
      TQ_SELECT_ISA(rms_norm_row)(type, from + at, weight.const_data_ptr(), static_cast<float>(eps), size, to + at);
    }
  });
  return out;
}

QueriesKeysValues project(
    const char* op, const Tensor& x, const QkvWeights& weights, const Tensor& cos, const Tensor& sin) {
  const ElementType type = element_type_of(x, op, "x");
  STD_TORCH_CHECK(cos.dim() == 3 && sin.dim() == 3, op, ": cos and sin must have 3 axes");
  const int64_t batch = x.size(0), length = x.size(1), size = x.size(2), head_size = cos.size(2);
  STD_TORCH_CHECK(weights.norm.numel() == size, op, ": norm_weight must have a number for each column of x");
  STD_TORCH_CHECK(
      head_size > 0 && head_size % 2 == 0 && weights.q.size_out() % head_size == 0 &&
          weights.k.size_out() % head_size == 0 && weights.v.size_out() == weights.k.size_out(),
      op, ": the weights must have whole heads of the size of cos");
  STD_TORCH_CHECK(
      cos.size(1) == length && (cos.size(0) == batch || cos.size(0) == 1) && sin.size(0) == cos.size(0) &&
          sin.size(1) == length && sin.size(2) == head_size,
      op, ": cos and sin must be [N, T, d] or [1, T, d]");
  const Tensor normed = rms_norm(torch::stable::view(x, {batch * length, size}), weights.norm, weights.eps);
  auto [q, k, v] = run_linear_layers<3>(normed, type, {&weights.q, &weights.k, &weights.v});
  const int64_t q_heads = weights.q.size_out() / head_size, kv_heads = weights.k.size_out() / head_size;
  QueriesKeysValues result{
      torch::stable::view(q, {batch, length, q_heads, head_size}),
      torch::stable::view(k, {batch, length, kv_heads, head_size}),
      torch::stable::view(v, {batch, length, kv_heads, head_size})};
  rotate(result.q, type, cos, sin);
  rotate(result.k, type, cos, sin);
  return result;
}

Tensor finish(const char* op, const Tensor& attended, const Tensor& residual, const FinishWeights& weights) {
  const ElementType type = element_type_of(residual, op, "residual");
  const int64_t rows = residual.size(0) * residual.size(1), size = residual.size(2), inner = weights.gate.size_out();
  STD_TORCH_CHECK(
      attended.size(0) == residual.size(0) && attended.size(1) == residual.size(1), op,
      ": attended must have the rows of residual");
  STD_TORCH_CHECK(
      weights.norm.numel() == size && weights.o.size_out() == size && weights.down.size_out() == size &&
          weights.up.size_out() == inner,
      op, ": the weights must lead from the columns of residual back to them");
  const int64_t bytes = static_cast<int64_t>(residual.element_size());
  Tensor out = new_tensor({residual.size(0), residual.size(1), size}, residual.scalar_type());
  const auto* const residual_data = static_cast<const char*>(residual.const_data_ptr());
  auto* const out_data = static_cast<char*>(out.mutable_data_ptr());

  const auto [projected] =
      run_linear_layers<1>(torch::stable::view(attended, {rows, attended.size(2)}), type, {&weights.o});
  const auto* const projected_data = static_cast<const char*>(projected.const_data_ptr());
  for_elements(rows, size, [&](int64_t begin, int64_t count) {
    const int64_t at = begin * bytes;
    TQ_SELECT_ISA(add_row)(type, residual_data + at, projected_data + at, count, out_data + at);
  });
  const Tensor normed = rms_norm(torch::stable::view(out, {rows, size}), weights.norm, weights.eps);
  auto [gated, up] = run_linear_layers<2>(normed, type, {&weights.gate, &weights.up});
  auto* const gated_data = static_cast<char*>(gated.mutable_data_ptr());
  const auto* const up_data = static_cast<const char*>(up.const_data_ptr());
  for_elements(rows, inner, [&](int64_t begin, int64_t count) {
    const int64_t at = begin * bytes;
    TQ_SELECT_ISA(silu_mul_row)(type, gated_data + at, up_data + at, count, gated_data + at);
  });
  const auto [lowered] = run_linear_layers<1>(gated, type, {&weights.down});
  const auto* const lowered_data = static_cast<const char*>(lowered.const_data_ptr());
  for_elements(rows, size, [&](int64_t begin, int64_t count) {
    const int64_t at = begin * bytes;
    TQ_SELECT_ISA(add_row)(type, out_data + at, lowered_data + at, count, out_data + at);
  });
  return out;
}

}  // namespace tq
