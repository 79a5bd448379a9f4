#include "cpu/simd/widen_rows.h"

#include "cpu/simd/floats.h"

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

}  // namespace TQ_ISA
}  // namespace tq
