// Many rows times a weight matrix. A block of weights is transposed once, sixteen outputs beside one
// another, and multiplied by every row of x, one number of the row at a time. Included only by
// linear_rows.cpp.
//
// The sums are formed in the order of the few rows' tile, so that both give the same bits: first each lane
// over the columns of the block, then the lanes, pair by pair as that tile folds them.
#pragma once

#include "cpu/linear/linear_blocks.h"
#include "cpu/simd/transpose.h"

namespace tq {
namespace TQ_ISA {

#if defined(__AVX512F__)

// A tile of kMostManyTileRows rows and kManyVectors vectors of outputs fills the registers.
constexpr int kManyVectors = kOutputsTogether / kLanes;
// The most tiles of rows that meet a block of weights before the next block is transposed.
constexpr int64_t kMostTilesTogether = 16;
// Vectors of words in a block. A word is what a lane multiplies at once: a float, or a pair of bf16.
constexpr int64_t kMostVectors = kMostColumns / kLanes;
// The order in which the lanes' sums are added.
constexpr int kLaneOrder[kLanes] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
constexpr int kFoldLevels = 4;

template <typename Step>
constexpr int64_t kVectorBytes = Step::kColumns / Step::kParts * static_cast<int64_t>(sizeof(typename Step::Stored));

// Transposes the words of kLanes rows: to[place * to_stride + i] = vector `index` of row i, its lane
// kLaneOrder[place].
template <typename Step>
TQ_INLINE void turn_vectors(const typename Step::Stored* const* rows, int64_t index, float* to, int64_t to_stride) {
  const int64_t column = index / Step::kParts * Step::kColumns;
  __m512 words[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    words[i] = (__m512)Step::load_stored(rows[i] + column, static_cast<int>(index % Step::kParts));
  }
  transpose_in_registers(words);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) _mm512_store_ps(to + i * to_stride, words[kLaneOrder[i]]);
}

// Packs the tiles [first, last) of the rows of x: block by block, and in each tile by tile, as
// [lane][vector][row].
template <typename Step>
void pack_many(const FewRowsProduct& product, const void* x, int64_t x_stride, void* to, int64_t first, int64_t last) {
  using Stored = typename Step::Stored;
  const Blocks blocks = blocks_of<Step>(product.size_in);
  const int64_t num_tiles = many_tiles(product.rows);
  auto* out = static_cast<float*>(to);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t column = block * blocks.size < blocks.whole ? block * blocks.size : blocks.whole;
    const bool is_whole = column < blocks.whole;
    const int64_t left = blocks.whole - column;
    const int64_t columns = !is_whole ? Step::kColumns : left < blocks.size ? left : blocks.size;
    const int64_t vectors = columns / Step::kColumns * Step::kParts;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = part_begin(product.rows, num_tiles, tile);
      const int64_t count = part_begin(product.rows, num_tiles, tile + 1) - begin;
      typename Step::Stored padded[kLanes][Step::kColumns] = {};
      const Stored* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = static_cast<const Stored*>(x) + (begin + (i < count ? i : 0)) * x_stride + column;
        if (is_whole) continue;
        for (int64_t c = 0; c < product.size_in - column; ++c) padded[i][c] = rows[i][c];
        rows[i] = padded[i];
      }
      float* const to = out + tile * vectors * kLanes * kLanes;
      for (int64_t v = 0; v < vectors; ++v) turn_vectors<Step>(rows, v, to + v * kLanes, vectors * kLanes);
    }
    out += num_tiles * vectors * kLanes * kLanes;
  }
}

// The fetching of weights to come while tiles are multiplied: at most one row of them in every pass over a lane.
struct RowsAhead {
  ReadAhead* ahead;  // null: none
  int64_t rows;
  int64_t first_pass;
  int64_t num_passes;

  // The row to fetch in a pass, or null.
  TQ_ALWAYS_INLINE const char* take(int64_t pass, int64_t bytes) const {
    pass += first_pass;
    const bool is_due = part_begin(rows, num_passes, pass + 1) > part_begin(rows, num_passes, pass);
    return ahead != nullptr && is_due ? ahead->take(bytes / kCacheLine) : nullptr;
  }
};

// sums [kRows, kOutputsTogether] (+)= the tile of x times the turned weights.
template <typename Step, int kRows>
void multiply_many_tile(
    const float* weights, const float* x, int64_t vectors, const RowsAhead& ahead, bool is_first_block, float* sums) {
  alignas(64) Piece levels[kFoldLevels][kRows * kManyVectors];
  for (int pass = 0; pass < kLanes; ++pass) {
    const float* const left = weights + pass * vectors * kOutputsTogether;
    const float* const right = x + pass * vectors * kLanes;
    const char* const row = ahead.take(pass, vectors * kVectorBytes<Step>);
    const char* const fetched = row == nullptr ? reinterpret_cast<const char*>(left) : row;
    const int64_t fetched_step = row == nullptr ? 0 : kVectorBytes<Step>;
    Piece lane[kRows * kManyVectors];
#pragma GCC unroll 64
    for (int i = 0; i < kRows * kManyVectors; ++i) lane[i] = Piece{};
    for (int64_t v = 0; v < vectors; ++v) {
      __builtin_prefetch(fetched + v * fetched_step, 0, 2);
      typename Step::Vector outputs[kManyVectors];
#pragma GCC unroll 4
      for (int o = 0; o < kManyVectors; ++o) {
        __builtin_memcpy(&outputs[o], left + v * kOutputsTogether + o * kLanes, sizeof outputs[o]);
        load_once(outputs[o]);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        auto number = (typename Step::Vector)_mm512_set1_ps(right[v * kLanes + m]);
        load_once(number);
#pragma GCC unroll 4
        for (int o = 0; o < kManyVectors; ++o) {
          lane[m * kManyVectors + o] = Step::add_product(lane[m * kManyVectors + o], outputs[o], number);
        }
      }
    }
    int level = 0;
    for (; (pass >> level) & 1; ++level) {
#pragma GCC unroll 64
      for (int i = 0; i < kRows * kManyVectors; ++i) lane[i] = levels[level][i] + lane[i];
    }
    if (level < kFoldLevels) {
#pragma GCC unroll 64
      for (int i = 0; i < kRows * kManyVectors; ++i) levels[level][i] = lane[i];
      continue;
    }
#pragma GCC unroll 64
    for (int i = 0; i < kRows * kManyVectors; ++i) {
      auto* const to = reinterpret_cast<PieceU*>(sums + i * kLanes);
      *to = is_first_block ? lane[i] : *to + lane[i];
    }
  }
}

template <typename Step>
using MultiplyManyTile = void (*)(const float*, const float*, int64_t, const RowsAhead&, bool, float*);

// Tiles differ by one row at most, so none of kLeastManyRows or more rows is smaller.
constexpr int kLeastManyTileRows = kMostManyTileRows / 2;
static_assert(kLeastManyRows > kMostManyTileRows, "tiles of half the rows at least");

template <typename Step>
MultiplyManyTile<Step> multiply_many_tile_for(int64_t rows) {
  static constexpr MultiplyManyTile<Step> kFunctions[] = {multiply_many_tile<Step, 7>,  multiply_many_tile<Step, 8>,
                                                          multiply_many_tile<Step, 9>,  multiply_many_tile<Step, 10>,
                                                          multiply_many_tile<Step, 11>, multiply_many_tile<Step, 12>,
                                                          multiply_many_tile<Step, 13>, multiply_many_tile<Step, 14>};
  return kFunctions[rows - kLeastManyTileRows];
}

// One thread's share of a product, in steps of kOutputsTogether outputs.
template <typename Step>
class ManyShare {
 public:
  using Stored = typename Step::Stored;

  ManyShare(const FewRowsProduct& product, int64_t end)
      : product_(product),
        blocks_(blocks_of<Step>(product.size_in)),
        weight_(static_cast<const Stored*>(product.weight)),
        end_(end),
        num_tiles_(many_tiles(product.rows)),
        num_groups_((num_tiles_ + kMostTilesTogether - 1) / kMostTilesTogether) {}

  void multiply(int64_t begin) {
    for (int64_t first = begin; first < end_; first += kOutputsTogether) {
      for (int64_t group = 0; group < num_groups_; ++group) multiply_outputs(first, group);
    }
  }

 private:
  void multiply_outputs(int64_t first, int64_t group) {
    alignas(64) float weights[kMostVectors * kLanes * kOutputsTogether];
    alignas(64) float sums[kMostTilesTogether * kMostManyTileRows * kOutputsTogether];
    const int64_t last = first + kOutputsTogether < end_ ? first + kOutputsTogether : end_;
    const int64_t begin_tile = part_begin(num_tiles_, num_groups_, group);
    const int64_t end_tile = part_begin(num_tiles_, num_groups_, group + 1);
    const int64_t begin = part_begin(product_.rows, num_tiles_, begin_tile);
    const int64_t end = part_begin(product_.rows, num_tiles_, end_tile);
    for (int64_t i = 0; blocks_.count == 0 && i < (end - begin) * kOutputsTogether; ++i) sums[i] = 0.0f;
    for (int64_t block = 0; block < blocks_.count; ++block) {
      const int64_t vectors = turn_weights(first, last, block, weights);
      const float* const x = static_cast<const float*>(product_.packed_x) + words_before(block) * num_tiles_ * kLanes;
      for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
        const int64_t from = part_begin(product_.rows, num_tiles_, tile);
        const int64_t to = part_begin(product_.rows, num_tiles_, tile + 1);
        const RowsAhead ahead{
            product_.ahead, kOutputsTogether / product_.ahead_part, tile * kLanes, num_tiles_ * kLanes};
        multiply_many_tile_for<Step>(to - from)(
            weights, x + tile * vectors * kLanes * kLanes, vectors, ahead, block == 0,
            sums + (from - begin) * kOutputsTogether);
      }
    }
    finish_rows<typename Step::Element>(product_, begin, end, first, last, sums, kOutputsTogether);
  }

  int64_t words_before(int64_t block) const {
    const int64_t column = block * blocks_.size < blocks_.whole ? block * blocks_.size : blocks_.whole;
    return column / Step::kColumns * Step::kParts * kLanes;
  }

  // Transposes a block of columns of the weight rows [first, last) into to[lane][vector][row], the lanes in
  // their order. Returns the number of vectors.
  int64_t turn_weights(int64_t first, int64_t last, int64_t block, float* to) const {
    const int64_t column = block * blocks_.size;
    const bool is_whole = column < blocks_.whole;
    const int64_t left = blocks_.whole - column;
    const int64_t columns = !is_whole ? Step::kColumns : left < blocks_.size ? left : blocks_.size;
    const int64_t vectors = columns / Step::kColumns * Step::kParts;
    for (int64_t o = 0; o < kOutputsTogether; o += kLanes) {
      Stored padded[kLanes][Step::kColumns] = {};
      const Stored* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        // Rows beyond the last are the last row again; their sums are not used.
        const int64_t row = first + o + i < last ? first + o + i : last - 1;
        rows[i] = weight_ + row * product_.weight_stride + (is_whole ? column : blocks_.whole);
        if (is_whole) continue;
        for (int64_t c = 0; c < product_.size_in - blocks_.whole; ++c) padded[i][c] = rows[i][c];
        rows[i] = padded[i];
      }
      for (int64_t v = 0; v < vectors; ++v) {
        turn_vectors<Step>(rows, v, to + v * kOutputsTogether + o, vectors * kOutputsTogether);
      }
    }
    return vectors;
  }

  const FewRowsProduct& product_;
  Blocks blocks_;
  const Stored* weight_;
  int64_t end_;
  int64_t num_tiles_;
  int64_t num_groups_;
};

#endif

}  // namespace TQ_ISA
}  // namespace tq
