// int8 weights as numbers of x's type, for the kernels that multiply those. One copy for each ISA.
#pragma once

#include <cstdint>

#include "cpu/simd/element_type.h"
#include "cpu/simd/isa.h"

namespace tq {

// Rows of int8 weights, `stride` bytes apart, and where they go as numbers of `type`, `to_stride` of them
// apart. Every type holds every int8 exactly.
struct WidenedWeights {
  const int8_t* from;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  ElementType type;
  bool use_byte_tables;  // look bf16 up by the processor's instruction for tables of 128 bytes (AVX-512)
  void* to;
  int64_t to_stride;
};

#define TQ_DECLARE(isa)                              \
  namespace isa {                                    \
  void widen_weights(const WidenedWeights& widened); \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
