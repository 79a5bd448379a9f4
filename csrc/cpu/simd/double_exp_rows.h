// Exponentials of doubles: for merging the blocks of a row, and for the weights of roll-outs. One copy for
// each ISA.
#pragma once

#include <cstdint>

#include "cpu/simd/isa.h"

namespace tq {

#define TQ_DECLARE(isa)                                                                  \
  namespace isa {                                                                        \
  /* x[i] = exp(x[i]) for x[i] <= 0, within 2 units in the last place; NaN stays NaN. */ \
  void exp_in_place(double* x, int64_t count);                                           \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
