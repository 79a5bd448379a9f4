// Rows through one or more linear layers that read the same x: by our product, packed once and the weight
// rows divided among threads, or by the library's.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/linear/linear_rows.h"
#include "cpu/linear/widen_weights_rows.h"
#include "cpu/tensors/tensor_access.h"
#include "cpu/threads/team.h"

namespace tq {

// With fewer bytes of weights than this, another thread does not pay.
constexpr int64_t kLinearBytesPerThread = int64_t{1} << 16;

// Lines that a thread fetches at a time while it waits for others.
constexpr int64_t kLinesWhileWaiting = 8;

// With fewer parts of x than this, another thread does not pay for packing.
constexpr int64_t kPackedPartsPerThread = 4;

// The first cache line that begins in `room`, where rows are to begin: loading a vector that lies across two lines
// takes two loads.
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
  product.ahead_part = 1;
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
// multiplied, while later ones are fetched.
inline void multiply_widened(const FewRowsProduct& product, int64_t begin, int64_t end) {
  if (product.is_int8) return TQ_SELECT_ISA(multiply_few_rows)(product, begin, end);
  thread_local std::vector<char> room;
  const int64_t size = bytes_of(product.type);
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
    panel.ahead_part = size;
    TQ_SELECT_ISA(multiply_few_rows)(panel, 0, last - first);
  }
}

// With more rows than this, digits take longer than widening the weights once for all rows.
constexpr int64_t kMostInt8Rows = 256;
// So many products of two bytes cannot overflow a sum of 32 bits.
constexpr int64_t kMostInt8Columns = int64_t{1} << 16;

// Linear layers that read the same x [rows, size_in], on a team: its threads pack x, wait, and multiply.
template <size_t kCount>
class LinearGroup {
 public:
  // outputs[i] [rows, size_out of layers[i]]; packed_x has room for packed_bytes(rows, size_in). A thread makes
  // the same outputs of layers that are `alike`; otherwise the layers are divided as if they were one.
  LinearGroup(
      ElementType type, int64_t rows, const std::array<const LinearLayer*, kCount>& layers, bool alike, void* packed_x,
      const std::array<void*, kCount>& outputs)
      : rows_(rows), size_in_(layers[0]->weight.size(1)), alike_(alike) {
    FewRowsProduct any = product_of_rows(type, rows, size_in_, packed_x);
    any.is_int8 = any.use_amx && rows <= kMostInt8Rows && size_in_ <= kMostInt8Columns;
    for (const LinearLayer* const layer : layers) any.is_int8 &= layer->scale.has_value();
    unit_ = outputs_per_unit(any);
    for (size_t i = 0; i < kCount; ++i) {
      const LinearLayer& layer = *layers[i];
      FewRowsProduct& product = products_[i] = any;
      product.weight = layer.weight.const_data_ptr();
      product.weight_stride = layer.weight.stride(0);
      product.bias = data_or_null<void>(layer.bias);
      product.scale = data_or_null<float>(layer.scale);
      product.out = outputs[i];
      product.size_out = layer.size_out();
      weight_bytes_[i] = product.scale != nullptr ? 1 : bytes_of(type);
      num_units_[i] = (product.size_out + unit_ - 1) / unit_;
    }
  }

  int64_t rows() const { return rows_; }
  int64_t size_in() const { return size_in_; }
  int64_t size_out(size_t i) const { return products_[i].size_out; }

  int64_t bytes() const {
    int64_t sum = 0;
    for (size_t i = 0; i < kCount; ++i) sum += products_[i].size_out * size_in_ * weight_bytes_[i];
    return sum;
  }

  // The outputs of layer i that this thread makes.
  Range outputs(const Member& member, size_t i) const {
    int64_t first = 0;
    for (size_t j = 0; j < i && !alike_; ++j) first += num_units_[j];
    int64_t all = num_units_[0];
    for (size_t j = 1; j < kCount && !alike_; ++j) all += num_units_[j];
    const Range units = member.share(all);
    const int64_t begin = std::clamp<int64_t>(units.begin - first, 0, num_units_[i]);
    const int64_t end = std::clamp<int64_t>(units.end - first, 0, num_units_[i]);
    return {begin * unit_, std::min(end * unit_, products_[i].size_out)};
  }

  // Adds the weights that this thread reads, in order; weights whose rows lie apart are left out.
  void add_runs(const Member& member, std::vector<MemoryRun>& runs) const {
    for (size_t i = 0; i < kCount; ++i) {
      const Range range = outputs(member, i);
      if (range.begin >= range.end || products_[i].weight_stride != size_in_ || size_in_ == 0) continue;
      runs.push_back({weights(i, range.begin), weights(i, range.end)});
    }
  }

  // Packs this thread's parts of x, whose rows are `stride` elements apart. prepare(begin, end) makes rows of x.
  template <typename Prepare>
  void pack(const Member& member, const void* x, int64_t stride, const Prepare& prepare) const {
    const Range parts = member.share(packing_parts(products_[0]));
    if (parts.begin >= parts.end) return;
    prepare(packed_part_begin(products_[0], parts.begin), packed_part_begin(products_[0], parts.end));
    auto* const to = const_cast<void*>(products_[0].packed_x);
    TQ_SELECT_ISA(pack_rows)(products_[0], x, stride, to, parts.begin, parts.end);
  }
  void pack(const Member& member, const void* x, int64_t stride) const {
    pack(member, x, stride, [](int64_t, int64_t) {});
  }

  // Makes this thread's outputs; all of x is packed.
  void multiply(const Member& member, ReadAhead& ahead) const {
    for (size_t i = 0; i < kCount; ++i) {
      const Range range = outputs(member, i);
      if (range.begin >= range.end) continue;
      FewRowsProduct product = products_[i];
      product.ahead = &ahead;
      ahead.reach(weights(i, range.begin));
      if (product.scale != nullptr) {
        multiply_widened(product, range.begin, range.end);
      } else {
        TQ_SELECT_ISA(multiply_few_rows)(product, range.begin, range.end);
      }
    }
  }

 private:
  const char* weights(size_t i, int64_t row) const {
    return static_cast<const char*>(products_[i].weight) + row * products_[i].weight_stride * weight_bytes_[i];
  }

  std::array<FewRowsProduct, kCount> products_;
  std::array<int64_t, kCount> weight_bytes_;
  std::array<int64_t, kCount> num_units_;
  int64_t rows_;
  int64_t size_in_;
  int64_t unit_;
  bool alike_;
};

// Room for packed rows, kept from call to call, because the first touch of new memory is slow; there are few
// threads, and it is small.
inline void* packing_room(int64_t rows, int64_t size_in) {
  thread_local std::vector<char> room;
  room.resize(std::max<size_t>(room.size(), packed_bytes(rows, size_in) + kCacheLine));
  return line_of(room.data());
}

// out [rows, size_out] = x through a layer by our product. x has rows of size_in elements, `stride` apart.
inline void multiply_by_us(
    const void* x, int64_t stride, int64_t rows, ElementType type, const LinearLayer& layer, void* out) {
  const int64_t size_in = layer.weight.size(1);
  if (rows == 0 || layer.size_out() == 0) return;
  const LinearGroup<1> group(type, rows, {&layer}, false, packing_room(rows, size_in), {out});
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  run_as_reading_team(
      std::clamp<int64_t>(group.bytes() / kLinearBytesPerThread, 1, threads),
      [&](const Member& member, auto& runs) { group.add_runs(member, runs); },
      [&](Member& member, ReadAhead& ahead) {
        group.pack(member, x, stride);
        member.wait([&] { return ahead.fetch(kLinesWhileWaiting); });
        group.multiply(member, ahead);
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

// Whether so many rows go through the layers by the library's product. It has none with int8 weights that would
// not first copy them.
template <size_t kCount>
bool is_for_library(ElementType type, int64_t rows, const std::array<const LinearLayer*, kCount>& layers) {
  bool has_int8 = false;
  for (const LinearLayer* const layer : layers) has_int8 |= layer->scale.has_value();
  return rows > most_rows_of_our_product(type) && !has_int8;
}

}  // namespace tq
