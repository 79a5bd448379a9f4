// A row of logits and the blocks that it is reduced in: plain data that the torch side (base flags) and the
// vector side (one copy for each ISA) exchange.
#pragma once

#include <cstdint>

#include "common/online_softmax.h"
#include "cpu/simd/element_type.h"

namespace tq {

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

// Every kGroup-th element of a block is one of its strands: a block has kGroup of them, and a peak of each
// is what the k largest of a row are found from.
constexpr int kGroup = 64;

}  // namespace tq
