#include "cpu/trajectory/logit_transform_rows.h"

#include "cpu/simd/exp_and_tanh.h"

namespace tq {
namespace TQ_ISA {

void transform_logits(const LogitTransform& transform, const float* bias, int64_t count, float* x) {
  const F32x16 caps = broadcast(transform.softcap);
  alignas(64) float in[kLanes] = {};
  alignas(64) float in_bias[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    // Fewer numbers than a vector go through a vector of their own.
    const int64_t left = count - i;
    float* at = x + i;
    const float* bias_at = transform.has_bias ? bias + i : in_bias;
    if (left < kLanes) {
      for (int64_t lane = 0; lane < left; ++lane) in[lane] = x[i + lane];
      for (int64_t lane = 0; transform.has_bias && lane < left; ++lane) in_bias[lane] = bias[i + lane];
      at = in;
      bias_at = in_bias;
    }
    F32x16 value = load(at);
    if (transform.has_bias) value += load(bias_at);
    value *= transform.scale;
    if (transform.softcap != 0.0f) value = caps * tanh_of(value / caps);
    store(at, value);
    for (int64_t lane = 0; at == in && lane < left; ++lane) x[i + lane] = in[lane];
  }
}

}  // namespace TQ_ISA
}  // namespace tq
