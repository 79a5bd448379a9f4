// The k largest of a row, with its lse, in one pass over the logits.
//
// Every lane leaves the largest key of the 64 elements that it holds of a tile. The k-th largest of
// those keys is a lower bound of the k-th largest element, and only the lanes at or above it (k of
// them) can hold one of the k: their 64 k elements are looked at again, the rest of the row never is.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/ordered_key.h"
#include "cuda/tile.h"

namespace tq {

constexpr int kMostTopK = 128;
// Lane keys lie in shared memory, 256 bytes a tile: this many elements need 64 KB.
constexpr int64_t kMostVocabOfTopK = 1 << 19;

struct TopKRows {
  const void* logits;
  int64_t stride;
  int vocab_size;
  int k;
  float temperature;
  const float* temperatures;  // one a row, or null
  int64_t* ids;
  float* logprobs;
  float* lse;
};

// Shared memory of a block; only the leader's is used. Candidates have room beside the lane keys, which are
// still read while candidates come in.
struct TopKScratch {
  uint64_t* lane_keys;   // [32 tiles]; 0: this lane holds nothing
  uint64_t* candidates;  // [candidate_room]
  uint64_t* best;        // [k]
  SoftmaxState<float>* states;
  int* lanes;   // [k]
  int* counts;  // [2 * 32]: partial counts of warps, two rounds
  int* num_lanes;
  int* num_candidates;
};

TQ_HOST_DEVICE int candidate_room(int vocab_size, int k) {
  return vocab_size < k * kPerLane ? vocab_size : k * kPerLane;
}

TQ_HOST_DEVICE int64_t topk_shared_bytes(int vocab_size, int k) {
  const int64_t tiles = num_tiles(vocab_size);
  const int64_t keys = tiles * simt::kWarp + candidate_room(vocab_size, k) + k;
  return 8 * (keys + tiles) + 4 * (static_cast<int64_t>(k) + 2 * simt::kWarp + 2);
}

TQ_DEVICE TopKScratch cut_topk_scratch(int vocab_size, int k) {
  const int tiles = num_tiles(vocab_size);
  TopKScratch scratch;
  scratch.lane_keys = reinterpret_cast<uint64_t*>(simt::shared_memory());
  scratch.candidates = scratch.lane_keys + tiles * simt::kWarp;
  scratch.best = scratch.candidates + candidate_room(vocab_size, k);
  scratch.states = reinterpret_cast<SoftmaxState<float>*>(scratch.best + k);
  scratch.lanes = reinterpret_cast<int*>(scratch.states + tiles);
  scratch.counts = scratch.lanes + k;
  scratch.num_lanes = scratch.counts + 2 * simt::kWarp;
  scratch.num_candidates = scratch.num_lanes + 1;
  return scratch;
}

// The key of the largest element that this lane holds, the lowest id among equals; 0 for none.
template <typename Type>
TQ_DEVICE uint64_t key_of_lane(const LogitRow<Type>& row, int tile, const float (&values)[kPerLane]) {
  float best = values[0];
  int place = 0;
  TQ_UNROLL
  for (int n = 1; n < kPerLane; ++n) {
    if (values[n] > best) {
      best = values[n];
      place = n;
    }
  }
  const int id = id_in_tile<Type>(tile, place / kPerLoad<Type>, simt::lane(), place % kPerLoad<Type>);
  return id < row.size ? ordered_key(best, static_cast<uint32_t>(id)) : 0;
}

// Returns a threshold that exactly k of `count` distinct keys reach, or 1 where fewer than k are not 0. The
// whole block takes part. There are two rounds of partial counts, so that one barrier a bit is enough.
TQ_DEVICE uint64_t threshold_of(const uint64_t* keys, int count, int k, int* counts) {
  uint64_t threshold = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t wanted = threshold | static_cast<uint64_t>(1) << bit;
    int own = 0;
    for (int i = simt::thread(); i < count; i += simt::num_threads()) own += keys[i] >= wanted;
    own = simt::warp_sum(own);
    int* const round = counts + (bit % 2) * simt::kWarp;
    if (simt::lane() == 0) round[simt::thread() / simt::kWarp] = own;
    simt::sync_block();
    int reached = 0;
    for (int w = 0; w < simt::num_threads() / simt::kWarp; ++w) reached += round[w];
    if (reached < k) continue;
    threshold = wanted;
    if (reached == k) break;
  }
  return threshold > 0 ? threshold : 1;
}

// Appends to `candidates` what the lanes at or above `threshold` hold at or above it, in any order.
template <typename Type>
TQ_DEVICE void collect_candidates(
    const LogitRow<Type>& row, const TopKScratch& scratch, int tiles, int k, uint64_t threshold) {
  for (int i = simt::thread(); i < tiles * simt::kWarp; i += simt::num_threads()) {
    if (scratch.lane_keys[i] < threshold) continue;
    const int slot = simt::add_to_shared(scratch.num_lanes, 1);
    if (slot < k) scratch.lanes[slot] = i;
  }
  simt::sync_block();
  const int parts = *scratch.num_lanes * kLoads<Type>;
  for (int part = simt::thread(); part < parts; part += simt::num_threads()) {
    const int source = scratch.lanes[part / kLoads<Type>];
    const int tile = source / simt::kWarp;
    const int lane = source % simt::kWarp;
    const int j = part % kLoads<Type>;
    float values[kPerLoad<Type>];
    load_part(row, tile, j, lane, values);
    TQ_UNROLL
    for (int i = 0; i < kPerLoad<Type>; ++i) {
      const int id = id_in_tile<Type>(tile, j, lane, i);
      const uint64_t key = ordered_key(values[i], static_cast<uint32_t>(id));
      if (id < row.size && key >= threshold) {
        scratch.candidates[simt::add_to_shared(scratch.num_candidates, 1)] = key;
      }
    }
  }
  simt::sync_block();
}

// Copies the k best candidates to `best`, in any order; `num_lanes` counts them.
TQ_DEVICE void keep_best(const TopKScratch& scratch, int k) {
  const int count = *scratch.num_candidates;
  const uint64_t threshold = count > k ? threshold_of(scratch.candidates, count, k, scratch.counts) : 1;
  if (simt::thread() == 0) *scratch.num_lanes = 0;
  simt::sync_block();
  for (int i = simt::thread(); i < count; i += simt::num_threads()) {
    if (scratch.candidates[i] >= threshold) {
      scratch.best[simt::add_to_shared(scratch.num_lanes, 1)] = scratch.candidates[i];
    }
  }
  simt::sync_block();
}

TQ_DEVICE void write_best(const TopKRows& rows, const TopKScratch& scratch, int64_t row, int tiles) {
  const SoftmaxState<double> state = merge_tiles(scratch.states, tiles);
  const double log_sum = ::log(state.sum);
  for (int i = simt::thread(); i < rows.k; i += simt::num_threads()) {
    const uint64_t key = scratch.best[i];
    int rank = 0;
    for (int other = 0; other < rows.k; ++other) rank += scratch.best[other] > key;
    const double value = value_of_key(key);
    rows.ids[row * rows.k + rank] = id_of_key(key);
    rows.logprobs[row * rows.k + rank] =
        state.sum == 0.0 ? -INFINITY : static_cast<float>(value - state.peak - log_sum);
  }
  if (simt::thread() == 0) rows.lse[row] = static_cast<float>(lse_of_softmax_state(state));
}

template <typename Type>
TQ_DEVICE void topk_row(const TopKRows& rows) {
  const int64_t row_idx = simt::group_idx();
  const int tiles = num_tiles(rows.vocab_size);
  const TopKScratch scratch = cut_topk_scratch(rows.vocab_size, rows.k);
  const float temperature = rows.temperatures == nullptr ? rows.temperature : rows.temperatures[row_idx];
  const LogitRow<Type> row = LogitRow<Type>::at(rows.logits, row_idx, rows.stride, rows.vocab_size, temperature);

  // Wait until the leader runs: its shared memory must exist before others write to it.
  simt::sync_group();
  uint64_t* const lane_keys = simt::of_leader(scratch.lane_keys);
  SoftmaxState<float>* const states = simt::of_leader(scratch.states);
  for (int tile = simt::warp_of_group(); tile < tiles; tile += simt::warps_of_group()) {
    float values[kPerLane];
    load_tile(row, tile, values);
    const SoftmaxState<float> state = state_of_tile(values);
    lane_keys[tile * simt::kWarp + simt::lane()] = key_of_lane(row, tile, values);
    if (simt::lane() == 0) states[tile] = state;
  }
  if (simt::group_rank() == 0 && simt::thread() == 0) {
    *scratch.num_lanes = 0;
    *scratch.num_candidates = 0;
  }
  simt::sync_group();
  if (simt::group_rank() != 0) return;

  const uint64_t threshold = threshold_of(scratch.lane_keys, tiles * simt::kWarp, rows.k, scratch.counts);
  collect_candidates(row, scratch, tiles, rows.k, threshold);
  keep_best(scratch, rows.k);
  write_best(rows, scratch, row_idx, tiles);
}

}  // namespace tq
