#include "cpu/linear/widen_weights_rows.h"

#include "cpu/linear/widen_by_tables.h"

namespace tq {
namespace TQ_ISA {

namespace {

typedef int8_t PieceBytes __attribute__((vector_size(kWidth)));
typedef int8_t PieceBytesU __attribute__((vector_size(kWidth), aligned(1), may_alias));

TQ_INLINE F32x16 floats_of(const int8_t* from) {
  F32x16 out;
  for_each_piece(out, [&](Piece& piece, int i) TQ_INLINED {
    const PieceBytes bytes = reinterpret_cast<const PieceBytesU*>(from)[i];
    piece = __builtin_convertvector(bytes, Piece);
  });
  return out;
}

template <typename Element>
TQ_INLINE void store_exact(typename Element::Stored* to, const F32x16& value) {
  Element::store_rounded(to, value);
}

// The lower half of the float of an int8 is zero.
template <>
TQ_ALWAYS_INLINE void store_exact<BFloat16>(uint16_t* to, const F32x16& value) {
  const U32x16 high = (U32x16)value >> 16;
  for_each_piece(high, [&](const PieceBits& piece, int i) TQ_INLINED {
    reinterpret_cast<PieceShortsU*>(to)[i] = __builtin_convertvector(piece, PieceShorts);
  });
}

template <typename Element>
void widen_row(const int8_t* from, int64_t columns, typename Element::Stored* to) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) store_exact<Element>(to + i, floats_of(from + i));
  for (; i < columns; ++i) to[i] = Element::rounded(static_cast<float>(from[i]));
}

template <typename Element>
void widen_rows(const WidenedWeights& widened) {
  auto* const to = static_cast<typename Element::Stored*>(widened.to);
  for (int64_t row = 0; row < widened.rows; ++row) {
    widen_row<Element>(widened.from + row * widened.stride, widened.columns, to + row * widened.to_stride);
  }
}

}  // namespace

void widen_weights(const WidenedWeights& widened) {
  switch (widened.type) {
    case ElementType::kFloat32:
      return widen_rows<Float32>(widened);
    case ElementType::kFloat16:
      return widen_rows<Float16>(widened);
    case ElementType::kBFloat16:
      break;
  }
#if defined(__AVX512F__)
  if (widened.use_byte_tables) {
    return widen_by_tables(
        widened.from, widened.stride, widened.rows, widened.columns, static_cast<uint16_t*>(widened.to),
        widened.to_stride);
  }
#endif
  widen_rows<BFloat16>(widened);
}

}  // namespace TQ_ISA
}  // namespace tq
