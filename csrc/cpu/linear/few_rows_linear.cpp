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
  multiply_by_us(x.const_data_ptr(), stride, rows, type, layer, out.mutable_data_ptr());
  return out;
}

int64_t most_rows_of_our_product(ElementType type) {
  const Isa isa = current_isa();
  if (isa == Isa::kBase) return 0;
  if (isa == Isa::kAvx2) return type == ElementType::kFloat32 ? 24 : 64;
  // Beyond that, oneDNN's product makes up for all else.
  if (type == ElementType::kBFloat16) return can_use_amx() || has_bf16_dot() ? 256 : 64;
  // MKL makes half of what AMD's processors can do with fp32, whatever the number of rows, and there is no
  // library for fp16.
  static const bool is_amd = cpu_has(CpuTrait::kAmd);
  if (is_amd) return 4096;
  return type == ElementType::kFloat32 ? 40 : 16;
}

int64_t most_few_rows(const Tensor& example) {
  // A quantiser's own product first makes a copy of int8 weights in the dtype of the rows.
  if (example.scalar_type() == ScalarType::Char) return current_isa() == Isa::kBase ? 0 : 256;
  return most_rows_of_our_product(element_type_of(example, "most_few_rows", "example"));
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) {
  m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear_cpu));
  m.impl("most_few_rows", TORCH_BOX(&most_few_rows));
}

}  // namespace tq
