// Blocks of keys for a tile of queries: scores, online softmax, weighted values. One copy for each ISA.
#pragma once

#include "common/platform.h"
#include "cpu/simd/element_type.h"
#include "cpu/simd/isa.h"
#include "cpu/threads/read_ahead.h"

namespace tq {

// Keys are taken in blocks of this many, from the first one on, for every query alike.
constexpr int64_t kKeysPerBlock = 64;
// Queries whose scores are in the scratch together.
constexpr int64_t kScoreRows = 12;

// Room for `count` numbers in whole vectors.
TQ_HOST_DEVICE int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Queries in fp32 and what has been gathered for each so far. Everything is padded to whole vectors.
struct QueryTile {
  int64_t count;
  int64_t head_size;
  const float* q;        // [count, padded(head_size)], zero beyond head_size
  const float* q_pairs;  // the same bf16 numbers, two a word, [count, head_size / 2]; null: multiply floats
  float* out;            // [count, padded(head_size)], not yet divided by the mass
  float* peaks;          // [count + 16], in units of log 2
  float* masses;         // [count, 16], one partial sum a lane
  // Each query sees the keys [first_seen, end_seen) of the segment.
  const int32_t* first_seen;
  const int32_t* end_seen;
};

// A segment of keys and values: the prefix of a tree, or the branch of a row.
struct KeySegment {
  const char* keys;
  const char* values;
  int64_t key_stride;  // in elements, from one position to the next
  int64_t value_stride;
  ElementType type;
  int64_t end;  // positions, all of them readable

  // Whether keys lie side by side, and values. Only such ones are read ahead: of each block the keys, then the values.
  inline __attribute__((always_inline)) bool is_dense(int64_t head_size) const {
    return key_stride == head_size && value_stride == head_size;
  }
  // Cache lines of `count` keys and their values that are read ahead.
  inline __attribute__((always_inline)) int64_t lines(int64_t head_size, int64_t count) const {
    return is_dense(head_size) ? 2 * count * head_size * bytes_of(type) / kCacheLine : 0;
  }
  // The block of keys from `begin` on is read now.
  inline __attribute__((always_inline)) void reach(ReadAhead& ahead, int64_t head_size, int64_t begin) const {
    if (is_dense(head_size)) ahead.reach(keys + begin * head_size * bytes_of(type));
  }
};

// How a product becomes a score in units of log 2: q . k * scale, then cap * tanh(score / cap) where there
// is a cap.
struct ScoreTransform {
  float scale;
  float cap;  // 0: none
};

// Room for one block of keys and values in fp32, and of scores.
struct AttentionScratch {
  float* keys;    // [padded(head_size), 64] or [64, padded(head_size)]
  float* values;  // [64, padded(head_size)]
  float* scores;  // [kScoreRows, 64]
  float* room;    // [16, padded(head_size)]
};

#define TQ_DECLARE(isa)                                                                                              \
  namespace isa {                                                                                                    \
  void start_queries(const QueryTile& tile);                                                                         \
  /* Takes the keys [begin, end) of the segment, at most kKeysPerBlock of them, into every query. */                 \
  void attend_block(                                                                                                 \
      const QueryTile& tile, const KeySegment& segment, int64_t begin, int64_t end, const ScoreTransform& transform, \
      const AttentionScratch& scratch, ReadAhead& ahead);                                                            \
  /* Takes the keys [begin, begin + kKeysPerBlock) of segments[m], what there is of them, into query    \
     m: by dot products, where there are too few queries to pay for transposing the keys; rounds         \
     differently. */            \
  void attend_block_of_few(                                                                                          \
      const QueryTile& tile, const KeySegment* segments, int64_t begin, const ScoreTransform& transform,             \
      const AttentionScratch& scratch, ReadAhead& ahead);                                                            \
  /* out[m] = the mean of the values in `type`; lse[m] = log of the mass. */                                         \
  void finish_query(const QueryTile& tile, int64_t m, ElementType type, void* out, float* lse);                      \
  /* One query of `size` numbers as floats, padded with zeros. */                                                    \
  void widen_padded(const void* from, ElementType type, int64_t size, float* to);                                    \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
