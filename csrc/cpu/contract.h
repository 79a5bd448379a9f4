// What a CPU op must be given, compared once, here. tq_fast/ops says in words what is wrong; an op
// that is called at once, before those words are looked for, refuses the same arguments.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "stable_tensor.h"

namespace tq {

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    if (tensor.size(axis++) != size) return false;
  }
  return true;
}

inline bool is_integer(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Long || type == ScalarType::Int;
}

inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

inline bool is_integers(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return has_shape(tensor, sizes) && is_integer(tensor);
}

inline bool is_floats(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return has_shape(tensor, sizes) && is_floating(tensor);
}

// A parameter that is one number or one a row: the tensor of this shape, or else what `number` says.
inline bool is_per_row(const std::optional<Tensor>& tensor, int64_t rows, bool number) {
  return tensor.has_value() ? has_shape(*tensor, {rows}) : number;
}

// An int that may come as a one-element tensor.
inline bool is_int(const std::optional<Tensor>& tensor) {
  return !tensor.has_value() || (tensor->numel() == 1 && is_integer(*tensor));
}

inline void require_contract(bool holds, const char* op) {
  STD_TORCH_CHECK(holds, op, ": an argument breaks the contract; tq_fast.ops.", op, " says which and how");
}

}  // namespace tq
