// The types of elements that the CPU kernels read: the tag that the torch side hands to the vector side.
#pragma once

#include <cstdint>

namespace tq {

enum class ElementType : int { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

}  // namespace tq
