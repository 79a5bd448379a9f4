// What a CPU op must be given, compared once, here. tq_fast/ops says in words what is wrong; an op
// that is called at once, before those words are looked for, refuses the same arguments.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <limits>
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
  return tensor.has_value() ? has_shape(*tensor, {rows}) && (is_floating(*tensor) || is_integer(*tensor)) : number;
}

// A finite number of fp32, in which the kernels compute.
inline bool is_float_number(double value) { return std::abs(value) <= std::numeric_limits<float>::max(); }

// None, or a bound above 0: one that is 0 in fp32 would count as none.
inline bool is_softcap(const std::optional<double>& value) {
  return !value.has_value() || (is_float_number(*value) && *value >= std::numeric_limits<float>::min());
}

// Written to in place: no two elements share their memory.
inline bool is_apart(const Tensor& tensor) {
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.stride(axis) == 0 && tensor.size(axis) > 1) return false;
  }
  return true;
}

// An int that may come as a one-element tensor.
inline bool is_int(const std::optional<Tensor>& tensor) {
  return !tensor.has_value() || (tensor->numel() == 1 && is_integer(*tensor));
}

inline void require_contract(bool holds, const char* op) {
  STD_TORCH_CHECK(holds, op, ": an argument breaks the contract; tq_fast.ops.", op, " says which and how");
}

}  // namespace tq
