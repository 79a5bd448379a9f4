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

// The k largest so far among ids seen in ascending order. Keys (common/ordered_key.h) collect until
// the capacity is reached; topk_shrink then keeps the best k and raises the threshold. An element
// enters when !(value <= threshold): NaN, the first threshold, lets everything in.
struct TopKQueue {
  uint64_t* keys;
  int64_t size;
  int64_t capacity;
  int64_t k;
  float threshold;
};

// Sets the first threshold just below the k-th largest of `count` values that belong to distinct
// elements still to come: at least k of those will enter. Reorders `values`.
void topk_start(TopKQueue* queue, float* values, int64_t count);

// Leaves the best min(k, size) keys, unordered, and sets the threshold when there are k of them.
void topk_shrink(TopKQueue* queue);

}  // namespace tq
