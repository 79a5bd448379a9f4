#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "common/ordered_key.h"
#include "cpu/row_types.h"

namespace tq {

void topk_start(TopKQueue* queue, float* values, int64_t count) {
  if (queue->k > count) return;
  std::nth_element(values, values + queue->k - 1, values + count, std::greater<float>());
  const float bound = values[queue->k - 1];
  // Nothing lies below -inf: then everything has to enter.
  if (bound > -std::numeric_limits<float>::infinity()) {
    queue->threshold = std::nextafter(bound, -std::numeric_limits<float>::infinity());
  }
}

void topk_shrink(TopKQueue* queue) {
  if (queue->size < queue->k) return;
  uint64_t* const last = queue->keys + queue->k - 1;
  std::nth_element(queue->keys, last, queue->keys + queue->size, std::greater<uint64_t>());
  queue->size = queue->k;
  queue->threshold = value_of_key(*last);
}

}  // namespace tq
