// Rows through one or more linear layers that read the same x: by our product, packed once and the weight
// rows divided among threads, or by the library's.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/linear/linear_rows.h"
#include "cpu/tensors/tensor_access.h"

namespace tq {

// With fewer bytes of weights than this, another thread does not pay.
constexpr int64_t kLinearBytesPerThread = int64_t{1} << 16;

// With fewer parts of x than this, another thread does not pay for packing.
constexpr int64_t kPackedPartsPerThread = 4;

// Rows begin at cache lines: loading a vector that lies across two lines takes two loads.
constexpr int64_t kCacheLine = 64;

// The first cache line that begins in `room`.
inline void* line_of(void* room) {
  const auto address = reinterpret_cast<uintptr_t>(room);
  return static_cast<char*>(room) + (kCacheLine - address % kCacheLine) % kCacheLine;
}

// Rows up to which our product beats the library's on this processor; 0: never.
int64_t most_rows_of_our_product(ElementType type);

// The weight and bias of a linear layer, checked against the rows that will go through it.
struct LinearLayer {
  Tensor weight;
  std::optional<Tensor> bias;

  LinearLayer(
      const Tensor& weight_in, const std::optional<Tensor>& bias_in, int64_t size_in, ScalarType type, const char* op)
      : weight(with_unit_inner_stride(weight_in)), bias(dense(bias_in, type)) {
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.size(1) == size_in && weight.scalar_type() == type, op,
        ": weight must have the columns and the dtype of x");
    STD_TORCH_CHECK(!bias.has_value() || bias->numel() == size_out(), op, ": bias must have a number for each output");
  }
  int64_t size_out() const { return weight.size(0); }
};

// Whether this run multiplies pairs of bf16 numbers.
inline bool has_bf16_dot() {
  static const bool processor_has = cpu_has(CpuTrait::kBf16Dot);
  return processor_has && current_isa() == Isa::kAvx512;
}

// Describes a product of so many rows as this run multiplies them; the caller fills in weight, bias, out
// and size_out.
inline FewRowsProduct product_of_rows(ElementType type, int64_t rows, int64_t size_in, const void* packed_x) {
  FewRowsProduct product{};
  product.packed_x = packed_x;
  product.type = type;
  product.use_bf16_dot = has_bf16_dot();
  product.use_amx = type == ElementType::kBFloat16 && can_use_amx();
  product.is_many = !product.use_amx && current_isa() == Isa::kAvx512 && rows >= kLeastManyRows;
  product.rows = rows;
  product.size_in = size_in;
  return product;
}

// product.packed_x = x: `rows` rows of `size_in` elements, `stride` elements apart.
inline void pack_all_rows(const FewRowsProduct& product, const void* x, int64_t stride) {
  auto* const to = const_cast<void*>(product.packed_x);
  torch::stable::parallel_for(0, packing_parts(product), kPackedPartsPerThread, [&](int64_t begin, int64_t end) {
    TQ_SELECT_ISA(pack_rows)(product, x, stride, to, begin, end);
  });
}

// outputs[i] [rows, size_out] = x through layers[i] by our product, in one parallel region for all layers.
// x has `rows` rows of `size_in` elements, `stride` elements apart.
template <size_t kCount>
void multiply_by_us(
    const void* x, int64_t stride, int64_t rows, int64_t size_in, ElementType type,
    const std::array<const LinearLayer*, kCount>& layers, std::array<void*, kCount> outputs) {
  // The room is kept from call to call, because the first touch of new memory is slow; there are few
  // threads, and it is small.
  thread_local std::vector<char> packed;
  packed.resize(std::max<size_t>(packed.size(), packed_bytes(rows, size_in) + kCacheLine));
  void* const packed_x = line_of(packed.data());
  const FewRowsProduct any = product_of_rows(type, rows, size_in, packed_x);
  const int64_t unit = outputs_per_unit(any);
  std::array<FewRowsProduct, kCount> products;
  std::array<int64_t, kCount> ends;  // of each layer's units of outputs, numbered through
  int64_t num_units = 0;
  for (size_t i = 0; i < kCount; ++i) {
    const LinearLayer& layer = *layers[i];
    FewRowsProduct& product = products[i] = any;
    product.weight = layer.weight.const_data_ptr();
    product.weight_stride = layer.weight.stride(0);
    product.bias = data_or_null<void>(layer.bias);
    product.out = outputs[i];
    product.size_out = layer.size_out();
    num_units += (layer.size_out() + unit - 1) / unit;
    ends[i] = num_units;
  }
  if (rows == 0 || num_units == 0) return;
  pack_all_rows(any, x, stride);

  const int64_t element = type == ElementType::kFloat32 ? 4 : 2;
  const int64_t unit_bytes = std::max<int64_t>(1, unit * size_in * element);
  const int64_t grain = std::max<int64_t>(1, kLinearBytesPerThread / unit_bytes);
  torch::stable::parallel_for(0, num_units, grain, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t i = 0; i < kCount; first = ends[i++]) {
      const int64_t from = (std::max(begin, first) - first) * unit;
      const int64_t to = std::min((std::min(end, ends[i]) - first) * unit, products[i].size_out);
      if (from < to) TQ_SELECT_ISA(multiply_few_rows)(products[i], from, to);
    }
  });
}

// x [rows, size_in] through a linear layer by the library's product.
inline Tensor multiply_by_library(const Tensor& x, const LinearLayer& layer) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(layer.weight),
      torch::stable::detail::from(layer.bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x [rows, size_in], dense, through layers that all read it, by the product that is faster for so many rows.
template <size_t kCount>
std::array<Tensor, kCount> run_linear_layers(
    const Tensor& x, ElementType type, const std::array<const LinearLayer*, kCount>& layers) {
  std::array<Tensor, kCount> results;
  const int64_t rows = x.size(0), size_in = x.size(1);
  if (rows > most_rows_of_our_product(type)) {
    for (size_t i = 0; i < kCount; ++i) results[i] = multiply_by_library(x, *layers[i]);
    return results;
  }
  std::array<void*, kCount> outputs;
  for (size_t i = 0; i < kCount; ++i) {
    results[i] = new_tensor({rows, layers[i]->size_out()}, x.scalar_type());
    outputs[i] = results[i].mutable_data_ptr();
  }
  multiply_by_us(x.const_data_ptr(), size_in, rows, size_in, type, layers, outputs);
  return results;
}

}  // namespace tq
