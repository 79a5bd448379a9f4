// skinny_linear on CPU: a linear layer whose input has few rows, at the speed of its weights.
#include <algorithm>

#include "cpu/skinny_rows.h"
#include "cpu/tensor_access.h"

namespace tq {

namespace {

// Columns that a thread takes at least; a multiple of every tile's width.
constexpr int64_t kGrain = 32;

Tensor as_float(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

}  // namespace

Tensor skinny_linear_cpu(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
  const ElementType type = element_type_of(weight_in, "skinny_linear", "weight");
  STD_TORCH_CHECK(x_in.scalar_type() == weight_in.scalar_type(), "skinny_linear: x and weight differ in dtype");
  const Tensor weight = with_unit_inner_stride(weight_in);
  const Tensor x = as_float(x_in);
  Tensor bias;
  if (bias_in.has_value()) bias = as_float(*bias_in);
  Tensor out = new_tensor({x.size(0), weight.size(0)}, ScalarType::Float);
  const SkinnyLinear layer{
      static_cast<const float*>(x.const_data_ptr()),
      weight.const_data_ptr(),
      weight.stride(0),
      type,
      bias_in.has_value() ? static_cast<const float*>(bias.const_data_ptr()) : nullptr,
      static_cast<float*>(out.mutable_data_ptr()),
      x.size(0),
      weight.size(0),
      weight.size(1)};
  const auto columns = TQ_SELECT_ISA(skinny_linear_columns);
  torch::stable::parallel_for(0, (layer.columns + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
    columns(layer, begin * kGrain, std::min(end * kGrain, layer.columns));
  });
  return x_in.scalar_type() == ScalarType::Float ? out : torch::stable::to(out, x_in.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("skinny_linear", TORCH_BOX(&skinny_linear_cpu)); }

}  // namespace tq
