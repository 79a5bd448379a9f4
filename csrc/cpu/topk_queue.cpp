#include <algorithm>
#include <functional>
#include <limits>

#include "common/ordered_key.h"
#include "cpu/row_types.h"

namespace tq {

TopKQueue start_queue(uint64_t* keys, int64_t k) {
  return {keys, 0, queue_limit(k), k, std::numeric_limits<float>::quiet_NaN()};
}

void topk_shrink(TopKQueue* queue) {
  if (queue->size < queue->k) return;
  uint64_t* const rest = queue->keys + queue->k;
  uint64_t* const end = queue->keys + queue->size;
  std::nth_element(queue->keys, rest - 1, end, std::greater<uint64_t>());
  // Equal but for the place in the block.
  const uint64_t last = rest[-1] / kGroup;
  queue->size = std::partition(rest, end, [=](uint64_t key) { return key / kGroup == last; }) - queue->keys;
  queue->threshold = value_of_key(rest[-1]);
}

}  // namespace tq
