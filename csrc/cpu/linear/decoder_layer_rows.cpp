#include "cpu/linear/decoder_layer_rows.h"

#include "cpu/simd/exp_and_tanh.h"
#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

namespace {

// The elements [i, i + 16) of a row, zero beyond its end.
template <typename Element>
TQ_INLINE F32x16 load_at(const typename Element::Stored* row, int64_t i, int64_t size) {
  if (size - i >= kLanes) return Element::vector(row + i);
  typename Element::Stored padded[kLanes] = {};
  for (int64_t lane = 0; lane < size - i; ++lane) padded[lane] = row[i + lane];
  return Element::vector(padded);
}

template <typename Element>
TQ_INLINE void store_at(typename Element::Stored* row, int64_t i, int64_t size, F32x16 value) {
  if (size - i >= kLanes) return Element::store_rounded(row + i, value);
  typename Element::Stored padded[kLanes];
  Element::store_rounded(padded, value);
  for (int64_t lane = 0; lane < size - i; ++lane) row[i + lane] = padded[lane];
}

// Rounds as storing in a tensor of this type does.
template <typename Element>
TQ_INLINE F32x16 rounded(F32x16 value) {
  typename Element::Stored stored[kLanes];
  Element::store_rounded(stored, value);
  return Element::vector(stored);
}

template <>
TQ_ALWAYS_INLINE F32x16 rounded<Float32>(F32x16 value) {
  return value;
}

template <>
TQ_ALWAYS_INLINE F32x16 rounded<BFloat16>(F32x16 value) {
  return (F32x16)(BFloat16::rounded_bits(value) << 16);
}

template <typename Element>
void add_typed(
    const typename Element::Stored* a, const typename Element::Stored* b, int64_t size, typename Element::Stored* to) {
  for (int64_t i = 0; i < size; i += kLanes) {
    store_at<Element>(to, i, size, load_at<Element>(a, i, size) + load_at<Element>(b, i, size));
  }
}

template <typename Element>
void rms_norm_typed(
    const typename Element::Stored* x, const typename Element::Stored* weight, float eps, int64_t size,
    typename Element::Stored* to) {
  F32x16 squares = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32x16 value = load_at<Element>(x, i, size);
    squares += value * value;
  }
  const float mean = add_lanes(squares) / static_cast<float>(size);
  const F32x16 scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32x16 value = rounded<Element>(load_at<Element>(x, i, size) * scale);
    store_at<Element>(to, i, size, load_at<Element>(weight, i, size) * value);
  }
}

template <typename Element>
void silu_mul_typed(
    const typename Element::Stored* gate, const typename Element::Stored* up, int64_t size,
    typename Element::Stored* to) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32x16 x = load_at<Element>(gate, i, size);
    const F32x16 e = exp_nonpositive((F32x16)((I32x16)x | static_cast<int32_t>(0x80000000u)));
    const F32x16 share = select(x >= 0.0f, broadcast(1.0f), e) / (1.0f + e);
    store_at<Element>(to, i, size, rounded<Element>(x * share) * load_at<Element>(up, i, size));
  }
}

template <typename Element>
void rotate_typed(
    typename Element::Stored* x, const typename Element::Stored* cos, const typename Element::Stored* sin,
    int64_t num_heads, int64_t head_size) {
  const int64_t half = head_size / 2;
  for (int64_t head = 0; head < num_heads; ++head) {
    auto* const low = x + head * head_size;
    auto* const high = low + half;
    for (int64_t i = 0; i < half; i += kLanes) {
      const F32x16 a = load_at<Element>(low, i, half);
      const F32x16 b = load_at<Element>(high, i, half);
      const F32x16 a_cos = rounded<Element>(a * load_at<Element>(cos, i, half));
      const F32x16 b_sin = rounded<Element>(b * load_at<Element>(sin, i, half));
      const F32x16 b_cos = rounded<Element>(b * load_at<Element>(cos + half, i, half));
      const F32x16 a_sin = rounded<Element>(a * load_at<Element>(sin + half, i, half));
      store_at<Element>(low, i, half, a_cos - b_sin);
      store_at<Element>(high, i, half, b_cos + a_sin);
    }
  }
}

// Calls run(Element) with the element of the type.
template <typename Run>
TQ_INLINE void with_element(ElementType type, const Run& run) {
  switch (type) {
    case ElementType::kFloat32:
      return run(Float32{});
    case ElementType::kBFloat16:
      return run(BFloat16{});
    case ElementType::kFloat16:
      return run(Float16{});
  }
}

}  // namespace

void add_row(ElementType type, const void* a, const void* b, int64_t size, void* to) {
  with_element(type, [&](auto element) {
    using Stored = typename decltype(element)::Stored;
    add_typed<decltype(element)>(
        static_cast<const Stored*>(a), static_cast<const Stored*>(b), size, static_cast<Stored*>(to));
  });
}

void rms_norm_row(ElementType type, const void* x, const void* weight, float eps, int64_t size, void* to) {
  with_element(type, [&](auto element) {
    using Stored = typename decltype(element)::Stored;
    rms_norm_typed<decltype(element)>(
        static_cast<const Stored*>(x), static_cast<const Stored*>(weight), eps, size, static_cast<Stored*>(to));
  });
}

void silu_mul_row(ElementType type, const void* gate, const void* up, int64_t size, void* to) {
  with_element(type, [&](auto element) {
    using Stored = typename decltype(element)::Stored;
    silu_mul_typed<decltype(element)>(
        static_cast<const Stored*>(gate), static_cast<const Stored*>(up), size, static_cast<Stored*>(to));
  });
}

void rotate_row(ElementType type, void* x, const void* cos, const void* sin, int64_t num_heads, int64_t head_size) {
  with_element(type, [&](auto element) {
    using Stored = typename decltype(element)::Stored;
    rotate_typed<decltype(element)>(
        static_cast<Stored*>(x), static_cast<const Stored*>(cos), static_cast<const Stored*>(sin), num_heads,
        head_size);
  });
}

}  // namespace TQ_ISA
}  // namespace tq
