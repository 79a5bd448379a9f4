// Rows through one or more linear layers that read the same x: by our product, packed once and the weight
// rows divided among threads, or by the library's.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/linear/linear_rows.h"
#include "cpu/linear/widen_weights_rows.h"
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

// The tensors of a linear layer, checked against the rows that will go through it. With a scale the weight is
// int8: output o is scale[o] times the product of its weight row, plus bias[o].
struct LinearLayer {
  Tensor weight;
  std::optional<Tensor> bias;
  std::optional<Tensor> scale;
  ScalarType dtype;  // of x and the bias

  LinearLayer(
      const Tensor& weight_in, const std::optional<Tensor>& bias_in, const std::optional<Tensor>& scale_in,
      int64_t size_in, ScalarType type, const char* op)
      : weight(with_unit_inner_stride(weight_in)),
        bias(dense(bias_in, type)),
        scale(dense(scale_in, ScalarType::Float)),
        dtype(type) {
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.size(1) == size_in &&
            weight.scalar_type() == (scale.has_value() ? ScalarType::Char : type),
        op, ": weight must have the columns and the dtype of x, or be int8 and have a scale");
    STD_TORCH_CHECK(!bias.has_value() || bias->numel() == size_out(), op, ": bias must have a number for each output");
    STD_TORCH_CHECK(
        !scale.has_value() || (scale->dim() == 1 && scale->size(0) == size_out()), op,
        ": scale must have a number for each output");
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

// The bytes of weights that are widened at once; a panel stays in the cache until it has been multiplied.
constexpr int64_t kWidenedBytes = int64_t{1} << 15;

// Whether bf16 numbers are looked up by the instruction for tables of bytes.
inline bool has_byte_tables() {
  static const bool processor_has = cpu_has(CpuTrait::kByteTables);
  return processor_has;
}

// The outputs [begin, end) of a product with int8 weights: a panel of them is widened to the type of x, then
// multiplied, while the next panel is fetched.
inline void multiply_widened(const FewRowsProduct& product, int64_t begin, int64_t end) {
  if (product.is_int8) return TQ_SELECT_ISA(multiply_few_rows)(product, begin, end);
  thread_local std::vector<char> room;
  const int64_t size = product.type == ElementType::kFloat32 ? 4 : 2;
  const int64_t out_size = product.is_out_float ? 4 : size;
  // Rows that begin a power of two apart would share few sets of the cache.
  const int64_t line = kCacheLine / size;
  const int64_t stride = (product.size_in / line + 2) * line;
  const int64_t fitting = kWidenedBytes / (stride * size) / kWeightRowsPerTile * kWeightRowsPerTile;
  const int64_t panel_rows = std::clamp<int64_t>(fitting, outputs_per_unit(product), kOutputsTogether);
  room.resize(std::max<size_t>(room.size(), panel_rows * stride * size + kCacheLine));
  const auto* const weight = static_cast<const int8_t*>(product.weight);
  for (int64_t first = begin; first < end; first += panel_rows) {
    const int64_t last = std::min(first + panel_rows, end);
    FewRowsProduct panel = product;
    panel.weight = line_of(room.data());
    panel.weight_stride = stride;
    TQ_SELECT_ISA(widen_weights)(
        {weight + first * product.weight_stride, product.weight_stride, last - first, product.size_in, product.type,
         has_byte_tables(), const_cast<void*>(panel.weight), stride});
    panel.scale = product.scale + first;
    if (product.bias != nullptr) panel.bias = static_cast<const char*>(product.bias) + first * size;
    panel.out = static_cast<char*>(product.out) + first * out_size;
    const int64_t ahead_rows = std::min(panel_rows, end - last);
    panel.ahead = reinterpret_cast<const char*>(weight + (ahead_rows > 0 ? last : first) * product.weight_stride);
    panel.ahead_bytes = ahead_rows * product.weight_stride;
    TQ_SELECT_ISA(multiply_few_rows)(panel, 0, last - first);
  }
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
    product.scale = data_or_null<float>(layer.scale);
    // With more than a pair of tiles of x, weights that each pair widens anew cost more than a panel of them.
    product.is_int8 = product.scale != nullptr && product.use_amx && has_byte_tables() && rows <= 2 * kAmxRows;
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
      if (from >= to) continue;
      if (products[i].scale != nullptr) {
        multiply_widened(products[i], from, to);
      } else {
        TQ_SELECT_ISA(multiply_few_rows)(products[i], from, to);
      }
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
  // The library has no product with int8 weights that would not first copy them.
  bool has_int8 = false;
  for (const LinearLayer* const layer : layers) has_int8 |= layer->scale.has_value();
  if (rows > most_rows_of_our_product(type) && !has_int8) {
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
