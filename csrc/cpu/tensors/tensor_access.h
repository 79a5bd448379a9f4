// Reading arguments and making outputs on the torch side of the CPU ops. Stable ABI only.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu/simd/element_type.h"
#include "stable_tensor.h"

namespace tq {

inline ElementType element_type_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
}

// A dense CPU tensor, uninitialised.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType type) {
  return new_tensor_on(aoti_torch_device_type_cpu(), 0, sizes, type);
}

// Reads an int that may also come as a one-element tensor.
inline int64_t read_int(int64_t number, const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return number;
  STD_TORCH_CHECK(tensor->numel() == 1, "an int that comes as a tensor has ", tensor->numel(), " elements, expected 1");
  const Tensor wide = dense(*tensor, ScalarType::Long);
  return *static_cast<const int64_t*>(wide.const_data_ptr());
}

// A parameter that is one number, or one for each row.
template <typename Number>
struct PerRow {
  Number shared;
  Tensor values;
  bool is_tensor;

  PerRow(Number number, const std::optional<Tensor>& tensor, ScalarType type)
      : shared(number), values(), is_tensor(tensor.has_value()) {
    if (is_tensor) values = dense(*tensor, type);
  }
  Number at(int64_t row) const { return is_tensor ? static_cast<const Number*>(values.const_data_ptr())[row] : shared; }
};

}  // namespace tq
