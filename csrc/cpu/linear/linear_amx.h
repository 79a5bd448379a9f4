// Rows times a bf16 weight matrix in the tile registers of AMX. A tile of weights is read as it lies in
// memory: sixteen outputs, 32 columns of each. x is packed once, sixteen rows a tile, so that both numbers
// of a pair of columns lie side by side. Included only by linear_rows.cpp.
//
// A tile of sums takes all columns in order, one pair after the other, so that a sum depends on neither the
// other rows nor their number. The products of numbers below the least normal float are lost, as the
// instruction has it.
#pragma once

#include "cpu/linear/linear_blocks.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/transpose.h"

namespace tq {
namespace TQ_ISA {

#if defined(__AVX512F__)

constexpr int64_t kAmxColumns = 32;
constexpr int64_t kAmxNumbers = kAmxRows * kAmxColumns;

constexpr int64_t amx_steps(int64_t size_in) { return (size_in + kAmxColumns - 1) / kAmxColumns; }

// Packs the tiles [first, last) of the rows of x: tile by tile, step by step of 32 columns, as
// [pair of columns][row].
inline void pack_amx(
    const FewRowsProduct& product, const void* x, int64_t x_stride, void* to, int64_t first, int64_t last) {
  const int64_t steps = amx_steps(product.size_in);
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tile * kAmxRows;
    const int64_t count = product.rows - row < kAmxRows ? product.rows - row : kAmxRows;
    const auto* const from = static_cast<const uint16_t*>(x) + row * x_stride;
    auto* const out = static_cast<uint16_t*>(to) + tile * steps * kAmxNumbers;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t column = step * kAmxColumns;
      const bool is_whole = column + kAmxColumns <= product.size_in;
      __m512 words[kAmxRows];
      for (int64_t i = 0; i < kAmxRows; ++i) {
        if (i >= count) {
          words[i] = _mm512_setzero_ps();
        } else if (is_whole) {
          words[i] = _mm512_loadu_ps(from + i * x_stride + column);
        } else {
          alignas(64) uint16_t padded[kAmxColumns] = {};
          for (int64_t c = column; c < product.size_in; ++c) padded[c - column] = from[i * x_stride + c];
          words[i] = _mm512_load_ps(padded);
        }
      }
      transpose_in_registers(words);
      for (int64_t i = 0; i < kAmxRows; ++i) _mm512_store_ps(out + step * kAmxNumbers + i * kAmxColumns, words[i]);
    }
  }
}

// Cache lines to come that are fetched in every step of columns while part `part` of the rows meets a panel: as many
// as the step reads, which the parts share, so that memory is never idle.
inline int64_t lines_ahead(const FewRowsProduct& product, int64_t part, int64_t parts) {
  if (product.ahead == nullptr) return 0;
  const int64_t lines = kOutputsTogether / product.ahead_part;
  return part_begin(lines, parts, part + 1) - part_begin(lines, parts, part);
}

// One thread's share of a product, in panels of kOutputsTogether outputs: two tiles of weights, which all
// tiles of x meet in pairs.
class AmxShare {
 public:
  AmxShare(const FewRowsProduct& product, int64_t end)
      : product_(product),
        weight_(static_cast<const uint16_t*>(product.weight)),
        end_(end),
        steps_(amx_steps(product.size_in)),
        num_tiles_(amx_tiles(product.rows)) {}

  void multiply(int64_t begin) const {
    const AmxRegisters registers;
    for (int64_t first = begin; first < end_; first += kOutputsTogether) {
      for (int64_t tile = 0; tile < num_tiles_; tile += 2) {
        tile + 1 < num_tiles_ ? multiply_panel<2>(first, tile) : multiply_panel<1>(first, tile);
      }
    }
  }

 private:
  static constexpr int64_t kTileOutputs = kOutputsTogether / 2;

  // The outputs from `first` on for the rows of kTiles tiles of x.
  template <int kTiles>
  void multiply_panel(int64_t first, int64_t tile) const {
    const int64_t last = first + kOutputsTogether < end_ ? first + kOutputsTogether : end_;
    const auto* const x = static_cast<const uint16_t*>(product_.packed_x) + tile * steps_ * kAmxNumbers;
    amx_clear<0>();
    amx_clear<1>();
    amx_clear<2>();
    amx_clear<3>();
    add_columns<kTiles>(first, last, tile, x);
    finish_tile<0, 2>(first, last, tile);
    if (kTiles == 2) finish_tile<1, 3>(first, last, tile + 1);
  }

  // Adds the products of all columns; weights are read as they lie.
  template <int kTiles>
  void add_columns(int64_t first, int64_t last, int64_t tile, const uint16_t* x) const {
    const int64_t whole = last - first == kOutputsTogether ? product_.size_in / kAmxColumns : 0;
    const int64_t stride = product_.weight_stride * static_cast<int64_t>(sizeof(uint16_t));
    const int64_t lines = lines_ahead(product_, tile / 2, (num_tiles_ + 1) / 2);
    for (int64_t step = 0; step < whole; ++step) {
      const uint16_t* const weights = weight_ + first * product_.weight_stride + step * kAmxColumns;
      if (lines > 0) product_.ahead->advance(lines);
      add_step<kTiles>(weights, weights + kTileOutputs * product_.weight_stride, stride, x + step * kAmxNumbers);
    }
    for (int64_t step = whole; step < steps_; ++step) {
      alignas(64) uint16_t padded[kOutputsTogether * kAmxColumns] = {};
      copy_weights(first, last, step * kAmxColumns, padded);
      add_step<kTiles>(padded, padded + kAmxNumbers, kAmxRowBytes, x + step * kAmxNumbers);
    }
  }

  // Adds the products of 32 columns: the sums of x tile t and weight tile w are register 2 * w + t.
  template <int kTiles>
  TQ_ALWAYS_INLINE void add_step(
      const uint16_t* weights, const uint16_t* more_weights, int64_t stride, const uint16_t* x) const {
    amx_load<4>(weights, stride);
    amx_load<6>(x, kAmxRowBytes);
    amx_multiply<0, 4, 6>();
    if (kTiles == 2) {
      amx_load<7>(x + steps_ * kAmxNumbers, kAmxRowBytes);
      amx_multiply<1, 4, 7>();
    }
    amx_load<5>(more_weights, stride);
    amx_multiply<2, 5, 6>();
    if (kTiles == 2) amx_multiply<3, 5, 7>();
  }

  // The weights [first, last) from `column` on as two tiles, zero where there are none.
  void copy_weights(int64_t first, int64_t last, int64_t column, uint16_t* to) const {
    const int64_t left = product_.size_in - column;
    const int64_t count = left < kAmxColumns ? left : kAmxColumns;
    for (int64_t row = first; row < last; ++row, to += kAmxColumns) {
      const uint16_t* const from = weight_ + row * product_.weight_stride + column;
      for (int64_t c = 0; c < count; ++c) to[c] = from[c];
    }
  }

  template <int kFirst, int kSecond>
  void finish_tile(int64_t first, int64_t last, int64_t tile) const {
    alignas(64) float outputs[kOutputsTogether][kAmxRows];
    alignas(64) float sums[kAmxRows * kOutputsTogether];
    amx_store<kFirst>(outputs, kAmxRowBytes);
    amx_store<kSecond>(outputs + kTileOutputs, kAmxRowBytes);
    for (int64_t part = 0; part < kOutputsTogether; part += kTileOutputs) {
      __m512 words[kAmxRows];
      for (int64_t i = 0; i < kTileOutputs; ++i) words[i] = _mm512_load_ps(outputs[part + i]);
      transpose_in_registers(words);
      for (int64_t i = 0; i < kAmxRows; ++i) _mm512_store_ps(sums + i * kOutputsTogether + part, words[i]);
    }
    const int64_t begin = tile * kAmxRows;
    const int64_t end = begin + kAmxRows < product_.rows ? begin + kAmxRows : product_.rows;
    finish_rows<BFloat16>(product_, begin, end, first, last, sums, kOutputsTogether);
  }

  const FewRowsProduct& product_;
  const uint16_t* weight_;
  int64_t end_;
  int64_t steps_;
  int64_t num_tiles_;
};

#endif

}  // namespace TQ_ISA
}  // namespace tq
