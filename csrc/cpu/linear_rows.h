// Few rows times a weight matrix as it lies in memory. One copy for each ISA.
#pragma once

#include "cpu/isa.h"
#include "cpu/row_types.h"

namespace tq {

// out [rows, size_out] = x [rows, size_in] @ weight [size_out, size_in]^T + bias
//
// Every output is the sum over blocks of columns, in order; a block is summed in sixteen lanes, which
// are then folded. The order depends on size_in, the type and the instruction set: not on the other
// rows, their number, or the threads.
struct FewRowsProduct {
  const void* weight;
  int64_t weight_stride;  // elements between weight rows
  const void* bias;       // size_out elements, or null
  const void* packed_x;   // what pack_rows made of x
  void* out;              // dense
  ElementType type;       // of weight, bias, x and out
  bool use_bf16_dot;      // multiply bf16 pairs by the processor's instruction for them (AVX-512)
  int64_t rows;
  int64_t size_in;
  int64_t size_out;
};

// Threads split size_out at multiples of this.
constexpr int64_t kWeightRowsPerTile = 4;

// Columns of a step at most: x is packed in whole ones.
constexpr int64_t kMostStepColumns = 32;

// Bytes that pack_rows writes at most.
inline int64_t packed_bytes(int64_t rows, int64_t size_in) {
  return rows * (size_in + kMostStepColumns) * static_cast<int64_t>(sizeof(float));
}

#define TQ_DECLARE(isa)                                                                      \
  namespace isa {                                                                            \
  /* x: rows of size_in elements, x_stride elements apart. */                                \
  void pack_rows(const FewRowsProduct& product, const void* x, int64_t x_stride, void* to);  \
  /* The outputs [begin, end) of every row. */                                               \
  void multiply_few_rows(const FewRowsProduct& product, int64_t begin, int64_t end);         \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
