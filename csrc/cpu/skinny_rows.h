// A linear layer for few rows: the vector side of skinny_linear.cpp.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/row_types.h"

namespace tq {

// out[row, column] = sum_i x[row, i] * weight[column, i] + bias[column], in fp32.
struct SkinnyLinear {
  const float* x;      // [rows, size], contiguous
  const void* weight;  // [columns, size], unit inner stride
  int64_t weight_stride;
  ElementType type;  // of the weight
  const float* bias;  // [columns] or null
  float* out;         // [rows, columns], contiguous
  int64_t rows;
  int64_t columns;
  int64_t size;
};

#define TQ_DECLARE(isa)                                                                       \
  namespace isa {                                                                             \
  void skinny_linear_columns(const SkinnyLinear& layer, int64_t first, int64_t last);         \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
