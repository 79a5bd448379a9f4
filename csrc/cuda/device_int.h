// A seed or a step that may lie on the device.
#pragma once

#include <cstdint>

#include "cuda/simt.h"

namespace tq {

// A number, or the place on the device where it stands: a captured graph reads it at every replay.
struct DeviceInt {
  int64_t number;
  const int64_t* place;
};

TQ_DEVICE int64_t read(const DeviceInt& value) { return value.place == nullptr ? value.number : *value.place; }

}  // namespace tq
