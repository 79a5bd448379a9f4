// The vector code of skinny_linear: compiled once for each instruction set (see isa.h).
//
// A tile is kColumns weight rows against up to kMaxRows rows of x. Its sums stay in registers, so
// that the weights stream through once, from memory, and x comes from the nearest cache.
#include "cpu/skinny_rows.h"

#include "cpu/simd.h"

namespace tq {
namespace TQ_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kColumns = 2;
constexpr int kMaxRows = 12;
#else
constexpr int kColumns = 1;
constexpr int kMaxRows = 5;
#endif

// Each sum runs over the lanes in the same order whatever the tile, so that a row's result does
// not depend on the other rows.
template <typename Element, int kRows, int kCols>
TQ_INLINE void tile(const SkinnyLinear& layer, int64_t row, int64_t column) {
  using Stored = typename Element::Stored;
  const Stored* weights[kCols];
  for (int c = 0; c < kCols; ++c) {
    weights[c] = static_cast<const Stored*>(layer.weight) + (column + c) * layer.weight_stride;
  }
  const float* const x = layer.x + row * layer.size;
  F32x16 sums[kRows][kCols] = {};
  const int64_t whole = layer.size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    F32x16 w[kCols];
    for (int c = 0; c < kCols; ++c) w[c] = Element::vector(weights[c] + i);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const F32x16 values = load(x + r * layer.size + i);
      for (int c = 0; c < kCols; ++c) sums[r][c] += values * w[c];
    }
  }
  for (int c = 0; c < kCols; ++c) {
    const float bias = layer.bias == nullptr ? 0.0f : layer.bias[column + c];
    for (int r = 0; r < kRows; ++r) {
      double sum = reduce_sum(sums[r][c]);
      for (int64_t i = whole; i < layer.size; ++i) {
        sum += static_cast<double>(x[r * layer.size + i]) * Element::scalar(weights[c][i]);
      }
      layer.out[(row + r) * layer.columns + column + c] = static_cast<float>(sum + bias);
    }
  }
}

template <typename Element, int kRows>
void rows_of_tiles(const SkinnyLinear& layer, int64_t row, int64_t column, int64_t num_columns) {
  if (num_columns == kColumns) {
    tile<Element, kRows, kColumns>(layer, row, column);
  } else {
    for (int64_t c = column; c < column + num_columns; ++c) tile<Element, kRows, 1>(layer, row, c);
  }
}

template <typename Element, int kRows>
void select_rows(const SkinnyLinear& layer, int64_t row, int64_t count, int64_t column, int64_t num_columns) {
  if constexpr (kRows > 1) {
    if (count < kRows) return select_rows<Element, kRows - 1>(layer, row, count, column, num_columns);
  }
  rows_of_tiles<Element, kRows>(layer, row, column, num_columns);
}

template <typename Element>
void columns_of(const SkinnyLinear& layer, int64_t first, int64_t last) {
  // Tiles as equal as possible: 14 rows are 7 + 7 rather than 12 + 2.
  const int64_t tiles = (layer.rows + kMaxRows - 1) / kMaxRows;
  for (int64_t column = first; column < last; column += kColumns) {
    const int64_t num_columns = last - column < kColumns ? last - column : kColumns;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = layer.rows * t / tiles;
      const int64_t end = layer.rows * (t + 1) / tiles;
      select_rows<Element, kMaxRows>(layer, begin, end - begin, column, num_columns);
    }
  }
}

}  // namespace

void skinny_linear_columns(const SkinnyLinear& layer, int64_t first, int64_t last) {
  switch (layer.type) {
    case ElementType::kFloat32:
      return columns_of<Float32>(layer, first, last);
    case ElementType::kBFloat16:
      return columns_of<BFloat16>(layer, first, last);
    case ElementType::kFloat16:
      return columns_of<Float16>(layer, first, last);
  }
}

}  // namespace TQ_ISA
}  // namespace tq
