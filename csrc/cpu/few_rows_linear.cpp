// few_rows_linear on CPU: the rows of x are packed once, the rows of the weight divided among threads.
#include <algorithm>
#include <vector>

#include "cpu/linear_rows.h"
#include "cpu/tensor_access.h"

namespace tq {

namespace {

// Bytes of weights below which a thread more does not pay.
constexpr int64_t kBytesPerThread = int64_t{1} << 16;

// A vector that lies across two lines takes two loads.
constexpr int64_t kCacheLine = 64;

bool has_bf16_dot() {
  static const bool detected = cpu_has(CpuTrait::kBf16Dot);
  return detected && current_isa() == Isa::kAvx512;
}

// x as rows that lie a fixed distance apart: itself where they do, else a copy.
Tensor evenly_spaced(const Tensor& x_in) {
  const Tensor x = with_unit_inner_stride(x_in);
  const bool is_even = x.dim() == 2 || x.size(0) <= 1 || x.size(1) <= 1 || x.stride(0) == x.size(1) * x.stride(1);
  return is_even ? x : torch::stable::contiguous(x);
}

}  // namespace

Tensor few_rows_linear_cpu(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
  const char* const op = "few_rows_linear";
  STD_TORCH_CHECK(x_in.dim() == 2 || x_in.dim() == 3, op, ": x must have 2 or 3 axes");
  const Tensor x = evenly_spaced(x_in);
  const Tensor weight = with_unit_inner_stride(weight_in);
  const ElementType type = element_type_of(x, op, "x");
  const bool is_flat = x.dim() == 2;
  const int64_t rows = is_flat ? x.size(0) : x.size(0) * x.size(1);
  const int64_t x_stride = is_flat || x.size(1) <= 1 ? x.stride(0) : x.stride(1);
  const int64_t size_in = x.size(x.dim() - 1);
  const int64_t size_out = weight.size(0);
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(1) == size_in && weight.scalar_type() == x.scalar_type(), op,
      ": weight must have the columns and the dtype of x");
  const std::optional<Tensor> bias = dense(bias_in, x.scalar_type());
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == size_out, op, ": bias must have a number for each output");
  Tensor out = is_flat ? new_tensor({rows, size_out}, x.scalar_type())
                       : new_tensor({x.size(0), x.size(1), size_out}, x.scalar_type());
  if (rows == 0 || size_out == 0) return out;

  // Kept from call to call: few and small, and the first touch of new memory is slow.
  thread_local std::vector<char> packed;
  packed.resize(std::max<size_t>(packed.size(), packed_bytes(rows, size_in) + kCacheLine));
  const auto address = reinterpret_cast<uintptr_t>(packed.data());
  void* const packed_x = packed.data() + (kCacheLine - address % kCacheLine) % kCacheLine;
  FewRowsProduct product{
      weight.const_data_ptr(), weight.stride(0), data_or_null<void>(bias), packed_x, out.mutable_data_ptr(),
      type, has_bf16_dot(), rows, size_in, size_out};
  TQ_SELECT_ISA(pack_rows)(product, x.const_data_ptr(), x_stride, packed_x);

  const int64_t bytes_per_tile =
      std::max<int64_t>(1, kWeightRowsPerTile * size_in * static_cast<int64_t>(weight.element_size()));
  const int64_t num_tiles = (size_out + kWeightRowsPerTile - 1) / kWeightRowsPerTile;
  torch::stable::parallel_for(
      0, num_tiles, std::max<int64_t>(1, kBytesPerThread / bytes_per_tile), [&](int64_t begin, int64_t end) {
        TQ_SELECT_ISA(multiply_few_rows)(
            product, begin * kWeightRowsPerTile, std::min(end * kWeightRowsPerTile, size_out));
      });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear_cpu)); }

}  // namespace tq
