// The work of a decoder layer on a row between its matrix products. One copy for each ISA.
//
// Every intermediate is rounded to the row's type where transformers' modules round it.
#pragma once

#include "cpu/simd/element_type.h"
#include "cpu/simd/isa.h"

namespace tq {

#define TQ_DECLARE(isa)                                                                                               \
  namespace isa {                                                                                                     \
  /* to = a + b */                                                                                                    \
  void add_row(ElementType type, const void* a, const void* b, int64_t size, void* to);                               \
  /* to = weight * (x / sqrt(mean(x^2) + eps)) */                                                                     \
  void rms_norm_row(ElementType type, const void* x, const void* weight, float eps, int64_t size, void* to);          \
  /* to = gate / (1 + exp(-gate)) * up; `to` may be either of them. */                                                \
  void silu_mul_row(ElementType type, const void* gate, const void* up, int64_t size, void* to);                      \
  /* Rotary positions in place, halves paired: x cos + (-x_high, x_low) sin, for each head of the row. */             \
  void rotate_row(ElementType type, void* x, const void* cos, const void* sin, int64_t num_heads, int64_t head_size); \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
