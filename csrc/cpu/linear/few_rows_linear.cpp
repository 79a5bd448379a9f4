// few_rows_linear on CPU.
#include "cpu/linear/linear_layers.h"

namespace tq {

namespace {

// Returns x if its rows lie a fixed distance apart, else a copy.
Tensor evenly_spaced(const Tensor& x_in) {
  const Tensor x = with_unit_inner_stride(x_in);
  const bool is_even = x.dim() == 2 || x.size(0) <= 1 || x.size(1) <= 1 || x.stride(0) == x.size(1) * x.stride(1);
  return is_even ? x : torch::stable::contiguous(x);
}

}  // namespace

Tensor few_rows_linear_cpu(
    const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale) {
  const char* const op = "few_rows_linear";
  STD_TORCH_CHECK(x_in.dim() == 2 || x_in.dim() == 3, op, ": x must have 2 or 3 axes");
  const Tensor x = evenly_spaced(x_in);
  const bool is_flat = x.dim() == 2;
  const int64_t rows = is_flat ? x.size(0) : x.size(0) * x.size(1);
  const int64_t stride = is_flat || x.size(1) <= 1 ? x.stride(0) : x.stride(1);
  const int64_t size_in = x.size(x.dim() - 1);
  const ElementType type = element_type_of(x, op, "x");
  const LinearLayer layer(weight, bias, scale, size_in, x.scalar_type(), op);
  Tensor out = is_flat ? new_tensor({rows, layer.size_out()}, x.scalar_type())
                       : new_tensor({x.size(0), x.size(1), layer.size_out()}, x.scalar_type());
  run_linear_layers(x.const_data_ptr(), stride, rows, size_in, type, {{layer, out.mutable_data_ptr()}});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear_cpu)); }

}  // namespace tq
