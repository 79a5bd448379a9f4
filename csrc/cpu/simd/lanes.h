// Sixteen lanes as the vectors that fit in registers: the compiler keeps only those of the processor's
// own width there, and wider ones in memory. Included only by floats.h.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#define TQ_ALWAYS_INLINE inline __attribute__((always_inline))
#define TQ_INLINE static TQ_ALWAYS_INLINE
// Stands after the parameters of a lambda.
#define TQ_INLINED __attribute__((always_inline))

namespace tq {
namespace TQ_ISA {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kPieces = kLanes / kWidth;

typedef float F32x4 __attribute__((vector_size(16)));
typedef float F32x8 __attribute__((vector_size(32)));
typedef float Piece __attribute__((vector_size(4 * kWidth)));
typedef int32_t PieceInts __attribute__((vector_size(4 * kWidth)));
typedef uint32_t PieceBits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t PieceShorts __attribute__((vector_size(2 * kWidth)));
// For unaligned access through pointers.
typedef float PieceU __attribute__((vector_size(4 * kWidth), aligned(4)));
typedef uint32_t PieceBitsU __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));
typedef uint16_t PieceShortsU __attribute__((vector_size(2 * kWidth), aligned(2)));

template <typename Vector>
using LaneOf = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<Vector&>()[0])>>;

// Two vectors as one of twice the lanes; every operator works lane by lane.
template <typename Half>
struct Twin {
  Half low;
  Half high;

  static constexpr int kHalf = sizeof(Half) / 4;
  TQ_ALWAYS_INLINE LaneOf<Half> operator[](int lane) const { return lane < kHalf ? low[lane] : high[lane - kHalf]; }
  // The same bits as lanes of another type.
  template <typename Other>
  TQ_ALWAYS_INLINE explicit operator Twin<Other>() const {
    return {(Other)low, (Other)high};
  }
  TQ_ALWAYS_INLINE Twin operator~() const { return {~low, ~high}; }
};

#define TQ_LANEWISE(op)                                                      \
  template <typename A, typename B>                                          \
  TQ_INLINE auto operator op(const Twin<A>& a, const Twin<B>& b) {           \
    return Twin<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high}; \
  }                                                                          \
  template <typename A>                                                      \
  TQ_INLINE auto operator op(const Twin<A>& a, LaneOf<A> b) {                \
    return Twin<decltype(a.low op b)>{a.low op b, a.high op b};              \
  }                                                                          \
  template <typename B>                                                      \
  TQ_INLINE auto operator op(LaneOf<B> a, const Twin<B>& b) {                \
    return Twin<decltype(a op b.low)>{a op b.low, a op b.high};              \
  }
TQ_LANEWISE(+)
TQ_LANEWISE(-)
TQ_LANEWISE(*)
TQ_LANEWISE(/)
TQ_LANEWISE(&)
TQ_LANEWISE(|)
TQ_LANEWISE(<<)
TQ_LANEWISE(>>)
TQ_LANEWISE(<)
TQ_LANEWISE(>=)
TQ_LANEWISE(==)
#undef TQ_LANEWISE

template <typename A, typename B>
TQ_INLINE Twin<A>& operator+=(Twin<A>& a, const B& b) {
  return a = a + b;
}
template <typename A, typename B>
TQ_INLINE Twin<A>& operator*=(Twin<A>& a, const B& b) {
  return a = a * b;
}

// The type of sixteen lanes, made of kCount pieces.
template <typename Vector, int kCount>
struct Joined {
  using Type = typename Joined<Twin<Vector>, kCount / 2>::Type;
};
template <typename Vector>
struct Joined<Vector, 1> {
  using Type = Vector;
};

typedef Joined<Piece, kPieces>::Type F32x16;
typedef Joined<PieceInts, kPieces>::Type I32x16;
typedef Joined<PieceBits, kPieces>::Type U32x16;

// Calls visit(piece, index) for the pieces of `whole`, in order.
template <typename Vector, typename Visit>
TQ_INLINE void for_each_piece(Vector& whole, const Visit& visit, int first = 0) {
  visit(whole, first);
}
template <typename Half, typename Visit>
TQ_INLINE void for_each_piece(Twin<Half>& whole, const Visit& visit, int first = 0) {
  for_each_piece(whole.low, visit, first);
  for_each_piece(whole.high, visit, first + static_cast<int>(sizeof(Half) / sizeof(Piece)));
}
template <typename Half, typename Visit>
TQ_INLINE void for_each_piece(const Twin<Half>& whole, const Visit& visit, int first = 0) {
  for_each_piece(whole.low, visit, first);
  for_each_piece(whole.high, visit, first + static_cast<int>(sizeof(Half) / sizeof(Piece)));
}

}  // namespace TQ_ISA
}  // namespace tq
