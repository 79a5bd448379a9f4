// Stored numbers as floats. One copy for each ISA.
#pragma once

#include <cstdint>

#include "cpu/simd/element_type.h"
#include "cpu/simd/isa.h"

namespace tq {

#define TQ_DECLARE(isa)                                                     \
  namespace isa {                                                           \
  /* to[i] = from[i] as a float, NaN kept. */                               \
  void widen(const void* from, ElementType type, int64_t count, float* to); \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
