// From a product's outputs to logits: bias, scale and soft-cap, in place. One copy for each ISA.
#pragma once

#include <cstdint>

#include "cpu/simd/isa.h"

namespace tq {

// logits = softcap * tanh(scale * (x + bias) / softcap); softcap 0 means no cap.
struct LogitTransform {
  float scale;
  float softcap;
  bool has_bias;

  bool is_identity() const { return scale == 1.0f && softcap == 0.0f && !has_bias; }
};

#define TQ_DECLARE(isa)                                                                               \
  namespace isa {                                                                                     \
  /* bias: `count` floats, read only where the transform has one. */                                  \
  void transform_logits(const LogitTransform& transform, const float* bias, int64_t count, float* x); \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
