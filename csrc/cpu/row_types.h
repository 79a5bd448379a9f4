// Plain data that the torch side (base flags) and the vector side (one copy for each ISA) exchange.
#pragma once

#include <cstdint>

#include "common/online_softmax.h"

namespace tq {

enum class ElementType : int { kFloat32, kBFloat16, kFloat16 };

// One row of logits with unit stride; NaN counts as -inf.
struct LogitsRow {
  const void* data;
  ElementType type;
  int64_t size;
};

// A row is reduced in blocks of this many elements, whatever the number of threads or rows, and the
// blocks are merged in order: a row's lse does not depend on the rest of the batch.
constexpr int64_t kBlock = 2048;

TQ_HOST_DEVICE int64_t num_blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Every kGroup-th element of a block is one of its strands; the block's reduction leaves their peaks.
constexpr int kGroup = 64;
constexpr int64_t kStrandLength = kBlock / kGroup;

// The k best strands so far of blocks seen in ascending order, by (peak descending, block ascending), and
// all that tie with the last of them: an element of any other strand has k elements before it, one in
// each of these. Keys (common/ordered_key.h) of a strand's peak and strand_id collect until, at the end of
// a block, there are `limit` of them; topk_shrink then keeps the best and raises the threshold. A strand
// enters when !(peak <= threshold): NaN, the first threshold, lets everything in.
struct TopKQueue {
  uint64_t* keys;
  int64_t size;
  int64_t limit;
  int64_t k;
  float threshold;
};

TQ_HOST_DEVICE uint32_t strand_id(int64_t block, int place) { return static_cast<uint32_t>(block * kGroup + place); }

// More than topk_shrink ever leaves, and the keys that then lie in the queue at most.
TQ_HOST_DEVICE int64_t queue_limit(int64_t k) { return k + kGroup; }
TQ_HOST_DEVICE int64_t queue_room(int64_t k) { return queue_limit(k) + kGroup; }

// An empty queue; `keys` has room for queue_room(k).
TopKQueue start_queue(uint64_t* keys, int64_t k);

// Leaves the best k strands and those that tie with the last of them, unordered.
void topk_shrink(TopKQueue* queue);

}  // namespace tq
