// Attention of bf16 queries in the tile registers of AMX. Only the AVX-512 variant has it, and it may be called
// only where can_use_amx() says so.
#pragma once

#include "cpu/attention/attention_rows.h"

namespace tq {

constexpr int64_t kAmxQueries = 16;

// Room for `count` bf16 numbers in whole rows of a tile.
TQ_HOST_DEVICE int64_t padded_for_amx(int64_t count) { return (count + 31) / 32 * 32; }

// Queries, sixteen a tile, one in each lane, and what has been gathered for each so far. The last tile is filled
// up with queries that see nothing.
struct AmxQueries {
  int64_t count;
  int64_t head_size;
  int64_t width;  // padded_for_amx(head_size)
  float* q;       // [tiles, width / 2, 16], two bf16 numbers a word
  float* out;     // [tiles * 16, width], not yet divided by the mass, in the order of pair_values
  float* peaks;   // [tiles, 16], in units of log 2
  float* masses;  // [tiles, 16]
  // Each query sees the keys [first_seen, end_seen) of the segment.
  const int32_t* first_seen;
  const int32_t* end_seen;
};

// Room for one block of keys and values, and for one tile of queries. It is small, so that it stays in the first
// cache beside the keys and values that stream through: where it does not, each of its lines waits behind those that
// come from memory.
struct AmxScratch {
  float* keys;     // [kKeysPerBlock, width / 2], two bf16 numbers a word
  float* values;   // [kKeysPerBlock / 2, width], two bf16 numbers a word
  float* scores;   // [kKeysPerBlock, 16]
  float* weights;  // [kKeysPerBlock / 32, 16, 16], two bf16 numbers a word
  float* out;      // [16, width]
};

#if TQ_HAS_X86_VARIANTS
namespace avx512 {
// Packs bf16 queries [count, width / 2], two numbers a word; nothing has been gathered for them.
void start_amx_queries(const AmxQueries& queries, const float* q_pairs);
// Takes the keys [first_key, end_key) of a segment into the queries [first, end), each those that it sees. The first
// key is the first of a block.
void attend_amx_segment(
    const AmxQueries& queries, int64_t first, int64_t end, const KeySegment& segment, int64_t first_key,
    int64_t end_key, const ScoreTransform& transform, const AmxScratch& scratch, ReadAhead& ahead);
// Writes what has been gathered into a tile of the same queries.
void unpack_amx_queries(const AmxQueries& queries, const QueryTile& tile);
}  // namespace avx512
#endif

}  // namespace tq
