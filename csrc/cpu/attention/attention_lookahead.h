// Prefetching of keys and values in the course of attention. Included only by *_rows.cpp (see isa.h).
#pragma once

#include "cpu/attention/attention_rows.h"
#include "cpu/simd/lanes.h"

namespace tq {
namespace TQ_ISA {

// Prefetches the keys and values of the next block while this one is multiplied, line by line: the
// processor forgets prefetches beyond those that it can wait for at a time.
class Lookahead {
 public:
  // Spreads the positions [begin, end) of a segment over `products` multiplied vectors.
  Lookahead(const KeySegment& segment, int64_t head_size, int64_t begin, int64_t end, int64_t products)
      : products_(products) {
    const int64_t element = bytes_of(segment.type);
    row_bytes_ = head_size * element;
    strides_[0] = segment.key_stride * element;
    strides_[1] = segment.value_stride * element;
    row_ = segment.keys + begin * strides_[0];
    values_ = segment.values + begin * strides_[1];
    rows_left_ = end - begin;
    rows_ = rows_left_;
    lines_ = begin < end ? 2 * rows_ * ((row_bytes_ + 63) / 64) : 0;
  }

  TQ_ALWAYS_INLINE void step(int64_t multiplied) {
    for (due_ += lines_ * multiplied; due_ >= products_; due_ -= products_) ask();
  }

 private:
  TQ_ALWAYS_INLINE void ask() {
    __builtin_prefetch(row_ + offset_, 0, 2);
    offset_ += 64;
    if (offset_ < row_bytes_) return;
    offset_ = 0;
    row_ += strides_[0];
    if (--rows_left_ > 0) return;
    rows_left_ = rows_;
    row_ = values_;
    strides_[0] = strides_[1];
  }

  int64_t products_;
  int64_t lines_;
  int64_t due_ = 0;
  int64_t offset_ = 0;
  int64_t row_bytes_;
  int64_t rows_;
  int64_t rows_left_;
  int64_t strides_[2];
  const char* row_;
  const char* values_;
};

}  // namespace TQ_ISA
}  // namespace tq
