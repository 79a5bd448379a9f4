// One block of a row of logits, whatever their type. Included only by *_rows.cpp (see isa.h).
#pragma once

#include "cpu/simd/add_exp.h"
#include "cpu/simd/floats.h"

namespace tq {
namespace TQ_ISA {

// A block is loaded in groups of four vectors; an element type may choose the order inside a group.
static_assert(kGroup == kParts * kLanes);

template <typename Element>
TQ_INLINE void load_group(Element, const typename Element::Stored* from, F32x16 (&x)[kParts]) {
  for (int part = 0; part < kParts; ++part) x[part] = Element::vector(from + part * kLanes);
}
template <typename Element>
TQ_INLINE int place_in_group(Element, int part, int lane) {
  return part * kLanes + lane;
}

// The two bf16 numbers of a word take one operation each; widening them in order takes two.
TQ_INLINE void load_group(BFloat16, const uint16_t* from, F32x16 (&x)[kParts]) {
  for (int part = 0; part < kParts; part += 2) {
    const U32x16 words = load_words(from + part * kLanes);
    x[part] = (F32x16)(words << 16);
    x[part + 1] = (F32x16)(words & 0xffff0000u);
  }
}
TQ_INLINE int place_in_group(BFloat16, int part, int lane) { return part / 2 * 2 * kLanes + 2 * lane + part % 2; }

// A block of a row. If its last group is not whole, the group is a copy that -inf fills up.
template <typename Element>
struct Block {
  using Stored = typename Element::Stored;
  const Stored* data;
  int64_t first;
  int64_t count;
  int64_t num_groups;
  Stored last[kGroup];

  TQ_ALWAYS_INLINE Block(const Stored* from, int64_t first_id, int64_t size)
      : data(from), first(first_id), count(size), num_groups((size + kGroup - 1) / kGroup) {
    const int64_t whole = count / kGroup * kGroup;
    if (whole == count) return;
    for (int64_t i = 0; i < kGroup; ++i) {
      last[i] = whole + i < count ? data[whole + i] : Element::rounded(kMinusInfinity);
    }
  }
  TQ_ALWAYS_INLINE Block(const LogitsRow& row, int64_t b)
      : Block(
            static_cast<const Stored*>(row.data) + b * kBlock, b * kBlock,
            row.size - b * kBlock < kBlock ? row.size - b * kBlock : kBlock) {}
  TQ_ALWAYS_INLINE void load(int64_t group, F32x16 (&x)[kParts]) const {
    load_group(Element{}, (group + 1) * kGroup <= count ? data + group * kGroup : last, x);
  }
};

// The block as floats in `values`, NaN as -inf, its tail padded with -inf to a whole group.
template <typename Element, bool kDivide>
TQ_INLINE void load_block(const Block<Element>& block, float divisor, float* values) {
  const F32x16 divisors = broadcast(divisor);
  for (int64_t i = 0; i < block.count; i += kLanes) {
    F32x16 x = broadcast(kMinusInfinity);
    if (i + kLanes <= block.count) {
      x = Element::vector(block.data + i);
    } else {
      float last[kLanes];
      store(last, x);
      for (int64_t lane = 0; i + lane < block.count; ++lane) last[lane] = Element::scalar(block.data[i + lane]);
      x = load(last);
    }
    store(values + i, clean(kDivide ? x / divisors : x));
  }
}

}  // namespace TQ_ISA
}  // namespace tq

// Calls function<Element>(arguments...) for the row's element type.
#define TQ_BY_ELEMENT(row, call)   \
  switch ((row).type) {            \
    case ElementType::kFloat32: {  \
      using Element = Float32;     \
      return call;                 \
    }                              \
    case ElementType::kBFloat16: { \
      using Element = BFloat16;    \
      return call;                 \
    }                              \
    default: {                     \
      using Element = Float16;     \
      return call;                 \
    }                              \
  }
