// Conditions on the arguments of the CPU ops. Each op compares them once, before it reads or writes
// anything, because torch.ops is open to everybody; tq_fast/ops checks the same and says in words what is
// wrong.
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

// Whether a parameter of each row is right: its tensor has one number a row; without a tensor, `number`
// says.
inline bool is_per_row(const std::optional<Tensor>& tensor, int64_t rows, bool number) {
  return tensor.has_value() ? has_shape(*tensor, {rows}) && (is_floating(*tensor) || is_integer(*tensor)) : number;
}

// Whether `value` is finite in fp32, in which the kernels compute.
inline bool is_float_number(double value) { return std::abs(value) <= std::numeric_limits<float>::max(); }

// Whether `value` is None, or above 0 in fp32: the kernels read a softcap of 0 as none.
inline bool is_softcap(const std::optional<double>& value) {
  return !value.has_value() || (is_float_number(*value) && *value >= std::numeric_limits<float>::min());
}

// Whether no two elements share their memory, as must be where an op writes in place.
inline bool is_apart(const Tensor& tensor) {
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.stride(axis) == 0 && tensor.size(axis) > 1) return false;
  }
  return true;
}

// Whether `tensor`, which may stand for an int, has one element.
inline bool is_int(const std::optional<Tensor>& tensor) {
  return !tensor.has_value() || (tensor->numel() == 1 && is_integer(*tensor));
}

inline void require_contract(bool holds, const char* op) {
  STD_TORCH_CHECK(holds, op, ": an argument breaks the contract; tq_fast.ops.", op, " says which and how");
}

}  // namespace tq
