// Shared by the products of few and of many rows: columns in blocks, and how sums become outputs. Included
// by linear_many.h and, through it, by linear_rows.cpp.
#pragma once

#include "cpu/linear/linear_rows.h"
#include "cpu/linear/linear_tile.h"

namespace tq {
namespace TQ_ISA {

// The most columns of a block.
constexpr int64_t kMostColumns = 768;

// The columns in blocks of `size`, which are whole steps; columns that fill no step are a block of their
// own.
struct Blocks {
  int64_t size;
  int64_t whole;  // columns in whole steps
  int64_t count;
};

template <typename Step>
TQ_INLINE Blocks blocks_of(int64_t size_in) {
  const int64_t steps = size_in / Step::kColumns;
  const int64_t whole = steps * Step::kColumns;
  const int64_t num_whole = (whole + kMostColumns - 1) / kMostColumns;
  const int64_t size = num_whole > 0 ? (steps + num_whole - 1) / num_whole * Step::kColumns : Step::kColumns;
  return {size, whole, (whole + size - 1) / size + (whole < size_in ? 1 : 0)};
}

// A step of stored elements, the first `count` of them copied and the others zero.
template <typename Step>
struct PaddedStep {
  typename Step::Stored values[Step::kColumns] = {};

  PaddedStep(const typename Step::Stored* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  }
};

// Writes the outputs [first, last) of the rows [begin, end) of x: their sums, `sums_stride` apart, plus the
// bias, rounded once.
template <typename Element, typename Out>
void round_rows(
    const FewRowsProduct& product, int64_t begin, int64_t end, int64_t first, int64_t last, const float* sums,
    int64_t sums_stride) {
  const auto* const bias = static_cast<const typename Element::Stored*>(product.bias);
  for (int64_t m = begin; m < end; ++m) {
    const float* const from = sums + (m - begin) * sums_stride - first;
    auto* const to = static_cast<typename Out::Stored*>(product.out) + m * product.size_out;
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes) {
      const F32x16 value = load(from + i);
      Out::store_rounded(to + i, bias != nullptr ? value + Element::vector(bias + i) : value);
    }
    for (; i < last; ++i) to[i] = Out::rounded(bias != nullptr ? from[i] + Element::scalar(bias[i]) : from[i]);
  }
}

// Multiplies the sums of the rows [begin, end) by the scales of their outputs [first, last), in a pass of its
// own: one with the bias would be rounded once or twice as the compiler likes.
inline void scale_rows(
    const FewRowsProduct& product, int64_t begin, int64_t end, int64_t first, int64_t last, float* sums,
    int64_t sums_stride) {
  for (int64_t m = begin; m < end; ++m, sums += sums_stride) {
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes) store(sums + i - first, load(sums + i - first) * load(product.scale + i));
    for (; i < last; ++i) sums[i - first] *= product.scale[i];
  }
}

template <typename Element>
void finish_rows(
    const FewRowsProduct& product, int64_t begin, int64_t end, int64_t first, int64_t last, float* sums,
    int64_t sums_stride) {
  if (product.scale != nullptr) scale_rows(product, begin, end, first, last, sums, sums_stride);
  const auto round = product.is_out_float ? round_rows<Element, Float32> : round_rows<Element, Element>;
  round(product, begin, end, first, last, sums, sums_stride);
}

}  // namespace TQ_ISA
}  // namespace tq
