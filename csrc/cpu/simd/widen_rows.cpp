#include "cpu/simd/widen_rows.h"

#include "cpu/simd/floats.h"
#include "cpu/simd/exp_and_tanh.h"

namespace tq {
namespace TQ_ISA {

namespace {

template <typename Element>
void widen_typed(const typename Element::Stored* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, Element::vector(from + i));
  for (; i < count; ++i) to[i] = Element::scalar(from[i]);
}

}  // namespace

void widen(const void* from, ElementType type, int64_t count, float* to) {
  switch (type) {
    case ElementType::kFloat32:
      return widen_typed<Float32>(static_cast<const float*>(from), count, to);
    case ElementType::kBFloat16:
      return widen_typed<BFloat16>(static_cast<const uint16_t*>(from), count, to);
    case ElementType::kFloat16:
      return widen_typed<Float16>(static_cast<const uint16_t*>(from), count, to);
  }
}

void transform_logits(const LogitTransform& transform, const float* bias, int64_t count, float* x) {
  const F32x16 caps = broadcast(transform.softcap);
  alignas(64) float in[kLanes] = {};
  alignas(64) float in_bias[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    // The last few go through a whole vector of their own.
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
