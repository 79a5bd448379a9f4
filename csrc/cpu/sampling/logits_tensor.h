// One row of a tensor of logits [N, V].
#pragma once

#include "cpu/sampling/logits_row.h"
#include "stable_tensor.h"

namespace tq {

inline LogitsRow logits_row(const Tensor& logits, ElementType type, int64_t row, int64_t size) {
  const auto* base = static_cast<const char*>(logits.const_data_ptr());
  const int64_t offset = row * logits.stride(0) * static_cast<int64_t>(logits.element_size());
  return {base + offset, type, size};
}

}  // namespace tq
