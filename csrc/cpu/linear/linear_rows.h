// Rows times a weight matrix as it lies in memory: few rows, for which nearly all the work is reading the
// weights, or many. One copy for each ISA.
#pragma once

#include "cpu/threads/read_ahead.h"
#include "cpu/simd/element_type.h"
#include "cpu/simd/isa.h"

namespace tq {

// out [rows, size_out] = x [rows, size_in] @ weight [size_out, size_in]^T + bias
//
// Every output is the sum over blocks of columns, in order; a block is summed in sixteen lanes, which
// are then folded. The order depends on size_in, the type and the instruction set: not on the other
// rows, their number (few and many rows are added up alike) or the threads.
struct FewRowsProduct {
  const void* weight;
  int64_t weight_stride;  // elements between weight rows
  const void* bias;       // size_out elements, or null
  const float* scale;     // size_out numbers by which the sums are multiplied before the bias, or null
  const void* packed_x;   // what pack_rows made of x
  void* out;              // dense
  ElementType type;       // of weight, bias, x and out
  bool is_out_float;      // out holds floats whatever the type
  bool use_bf16_dot;      // multiply bf16 pairs by the processor's instruction for them (AVX-512)
  bool is_int8;           // weight holds int8 numbers, which the tiles of AMX multiply by digits of x
  bool use_amx;           // multiply bf16 numbers in AMX tiles, however many rows there are
  bool is_many;           // turn blocks of weights once for all rows (AVX-512, kLeastManyRows or more)
  int64_t rows;
  int64_t size_in;
  int64_t size_out;
  ReadAhead* ahead;    // fetches weights to come, or null
  int64_t ahead_part;  // weights are made from memory of 1 / ahead_part of their bytes
};

// From this many rows on transposing the weights pays; and the most rows of a tile.
constexpr int64_t kLeastManyRows = 15;
constexpr int kMostManyTileRows = 14;

// Rows of a tile of AMX.
constexpr int64_t kAmxRows = 16;

// Rows of x that meet int8 weights together, as digits, and the steps of their columns.
constexpr int64_t kInt8GroupRows = 10;
constexpr int64_t int8_groups(int64_t rows) { return (rows + kInt8GroupRows - 1) / kInt8GroupRows; }
constexpr int64_t int8_steps(int64_t size_in) { return (size_in + 63) / 64; }

constexpr int64_t amx_tiles(int64_t rows) { return (rows + kAmxRows - 1) / kAmxRows; }
constexpr int64_t many_tiles(int64_t rows) { return (rows + kMostManyTileRows - 1) / kMostManyTileRows; }

// Threads split size_out at multiples of these.
constexpr int64_t kWeightRowsPerTile = 4;
constexpr int64_t kOutputsTogether = 32;

inline int64_t outputs_per_unit(const FewRowsProduct& product) {
  return product.use_amx || product.is_many ? kOutputsTogether : kWeightRowsPerTile;
}

// Where part `part` begins when a range of `size` is cut into `count` parts that differ by one at most.
constexpr int64_t part_begin(int64_t size, int64_t count, int64_t part) { return size * part / count; }

// Parts of x that threads may pack at once.
inline int64_t packing_parts(const FewRowsProduct& product) {
  if (product.is_int8) return int8_groups(product.rows);
  return product.use_amx ? amx_tiles(product.rows) : product.is_many ? many_tiles(product.rows) : 1;
}

// The first row of a part of x.
inline int64_t packed_part_begin(const FewRowsProduct& product, int64_t part) {
  if (!product.use_amx) return part_begin(product.rows, packing_parts(product), part);
  const int64_t row = part * (product.is_int8 ? kInt8GroupRows : kAmxRows);
  return row < product.rows ? row : product.rows;
}

// The most columns of a step; x is packed in whole steps.
constexpr int64_t kMostStepColumns = 32;

// The most bytes that pack_rows writes; tiles of many rows, and those of AMX, take the room of sixteen.
inline int64_t packed_bytes(int64_t rows, int64_t size_in) {
  const auto element = static_cast<int64_t>(sizeof(float));
  const int64_t wide = 16 * many_tiles(rows) * (size_in + kMostStepColumns) * element;
  const int64_t digits = int8_groups(rows) * (int8_steps(size_in) * 2048 + kInt8GroupRows * element);
  return wide > digits ? wide : digits;
}

#define TQ_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                             \
  /* The parts [first, last) of x: rows of size_in elements, x_stride elements apart. */                      \
  void pack_rows(                                                                                             \
      const FewRowsProduct& product, const void* x, int64_t x_stride, void* to, int64_t first, int64_t last); \
  /* The outputs [begin, end) of every row. */                                                                \
  void multiply_few_rows(const FewRowsProduct& product, int64_t begin, int64_t end);                          \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
