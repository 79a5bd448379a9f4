// The types of elements that the CPU kernels read: the tag that the torch side hands to the vector side.
#pragma once

namespace tq {

enum class ElementType : int { kFloat32, kBFloat16, kFloat16 };

}  // namespace tq
