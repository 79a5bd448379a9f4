// Helpers for tensors on the torch side of every op, whatever the device. Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace tq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes a tensor, uninitialised, with one stride for each size, by the C interface: torch::stable::empty goes
// through the dispatcher, which costs more than some of the ops here.
inline Tensor new_strided_tensor_on(
    int32_t device_type, int32_t device_index, std::initializer_list<int64_t> sizes, const int64_t* strides,
    ScalarType type) {
  const int32_t dtype = type == ScalarType::Long       ? aoti_torch_dtype_int64()
                        : type == ScalarType::Bool     ? aoti_torch_dtype_bool()
                        : type == ScalarType::Byte     ? aoti_torch_dtype_uint8()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                        : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// Makes a dense tensor, uninitialised.
inline Tensor new_tensor_on(
    int32_t device_type, int32_t device_index, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4] = {};
  int64_t stride = 1;
  for (int64_t axis = static_cast<int64_t>(sizes.size()) - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= sizes.begin()[axis] > 0 ? sizes.begin()[axis] : 1;
  }
  return new_strided_tensor_on(device_type, device_index, sizes, strides, type);
}

// Returns `tensor` if it is contiguous and of this type, else a copy. The test is made here because asking
// the dispatcher takes longer than a small op.
inline Tensor dense(const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() != type) return torch::stable::contiguous(torch::stable::to(tensor, type));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Returns `tensor` if its rows have unit stride, else a copy. Any outer stride is kept, so that a slice of
// a wider tensor is not copied.
inline Tensor with_unit_inner_stride(const Tensor& tensor) {
  const int64_t inner = tensor.dim() - 1;
  if (tensor.size(inner) <= 1 || tensor.stride(inner) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor, ScalarType type) {
  if (!tensor.has_value()) return std::nullopt;
  return dense(*tensor, type);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace tq
