// Few rows through one or more linear layers: packed once, the weight rows divided among threads.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "cpu/linear_rows.h"
#include "cpu/tensor_access.h"

namespace tq {

// Bytes of weights below which a thread more does not pay.
constexpr int64_t kLinearBytesPerThread = int64_t{1} << 16;

// Parts of x below which a thread more does not pay for packing it.
constexpr int64_t kPackedPartsPerThread = 4;

// A vector that lies across two lines takes two loads.
constexpr int64_t kCacheLine = 64;

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

struct LinearOutput {
  const LinearLayer& layer;
  void* out;  // dense [rows, size_out]
};

// x: `rows` rows of `size_in` elements, `stride` elements apart. One parallel region for all layers.
inline void run_linear_layers(
    const void* x, int64_t stride, int64_t rows, int64_t size_in, ElementType type,
    std::initializer_list<LinearOutput> outputs) {
  static const bool has_bf16_dot = cpu_has(CpuTrait::kBf16Dot);
  // Kept from call to call: few and small, and the first touch of new memory is slow.
  thread_local std::vector<char> packed;
  packed.resize(std::max<size_t>(packed.size(), packed_bytes(rows, size_in) + kCacheLine));
  const auto address = reinterpret_cast<uintptr_t>(packed.data());
  void* const packed_x = packed.data() + (kCacheLine - address % kCacheLine) % kCacheLine;
  const bool is_avx512 = current_isa() == Isa::kAvx512;
  const bool use_bf16_dot = has_bf16_dot && is_avx512;
  const bool is_many = is_avx512 && rows >= kLeastManyRows;

  std::vector<FewRowsProduct> products;
  std::vector<int64_t> ends;  // of each layer's units of outputs, numbered through
  int64_t num_units = 0;
  for (const LinearOutput& output : outputs) {
    const LinearLayer& layer = output.layer;
    products.push_back(
        {layer.weight.const_data_ptr(), layer.weight.stride(0), data_or_null<void>(layer.bias), packed_x, output.out,
         type, use_bf16_dot, is_many, rows, size_in, layer.size_out()});
    const int64_t unit = outputs_per_unit(products.back());
    num_units += (layer.size_out() + unit - 1) / unit;
    ends.push_back(num_units);
  }
  if (rows == 0 || num_units == 0) return;
  const FewRowsProduct& any = products.front();
  const int64_t parts = packing_parts(any);
  torch::stable::parallel_for(0, parts, kPackedPartsPerThread, [&](int64_t begin, int64_t end) {
    TQ_SELECT_ISA(pack_rows)(any, x, stride, packed_x, begin, end);
  });

  const int64_t unit = outputs_per_unit(any);
  const int64_t element = type == ElementType::kFloat32 ? 4 : 2;
  const int64_t unit_bytes = std::max<int64_t>(1, unit * size_in * element);
  const int64_t grain = std::max<int64_t>(1, kLinearBytesPerThread / unit_bytes);
  torch::stable::parallel_for(0, num_units, grain, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t i = 0; i < products.size(); first = ends[i++]) {
      const int64_t from = (std::max(begin, first) - first) * unit;
      const int64_t to = std::min((std::min(end, ends[i]) - first) * unit, products[i].size_out);
      if (from < to) TQ_SELECT_ISA(multiply_few_rows)(products[i], from, to);
    }
  });
}

}  // namespace tq
