// A row of logits as tiles of 2048 elements. One warp takes a tile: lane l holds, of each of its
// loads of 16 bytes a lane, the l-th sixteen bytes, so that ids ascend by (load, lane, element).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/online_softmax.h"
#include "cuda/simt.h"

namespace tq {

constexpr int kTile = 2048;
constexpr int kPerLane = kTile / simt::kWarp;

TQ_HOST_DEVICE int num_tiles(int64_t size) { return static_cast<int>((size + kTile - 1) / kTile); }

// Ids inside a row fit an int.
constexpr int64_t kMostVocab = int64_t{1} << 22;

// Conversion of stored elements to floats; `unpack` gives element i of a loaded quad.
struct Float32 {
  using Stored = float;
  TQ_DEVICE float widen(float stored) { return stored; }
  TQ_DEVICE float unpack(const simt::Quad& quad, int i) { return simt::float_from_bits(quad.words[i]); }
};

struct BFloat16 {
  using Stored = uint16_t;
  TQ_DEVICE float widen(uint16_t stored) { return simt::float_from_bits(static_cast<uint32_t>(stored) << 16); }
  TQ_DEVICE float unpack(const simt::Quad& quad, int i) {
    const uint32_t word = quad.words[i / 2];
    return simt::float_from_bits(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
};

struct Float16 {
  using Stored = uint16_t;
  TQ_DEVICE float widen(uint16_t stored) { return simt::float_from_half_bits(stored); }
  TQ_DEVICE float unpack(const simt::Quad& quad, int i) {
    const uint32_t word = quad.words[i / 2];
    return simt::float_from_half_bits(static_cast<uint16_t>(i % 2 == 0 ? word & 0xffffu : word >> 16));
  }
};

// Elements of one 16-byte load, and loads a tile.
template <typename Type>
constexpr int kPerLoad = 16 / static_cast<int>(sizeof(typename Type::Stored));
template <typename Type>
constexpr int kLoads = kPerLane / kPerLoad<Type>;

// One row; x is the logit, NaN as -inf, divided by `divisor`.
template <typename Type>
struct LogitRow {
  const typename Type::Stored* data;
  int size;
  float divisor;
  bool is_aligned;  // data stands at a multiple of 16 bytes

  TQ_DEVICE LogitRow at(const void* logits, int64_t row, int64_t stride, int size, float divisor) {
    const auto* data = static_cast<const typename Type::Stored*>(logits) + row * stride;
    return {data, size, divisor, reinterpret_cast<uintptr_t>(data) % 16 == 0};
  }
};

// fmaxf returns the number where the other operand is NaN.
TQ_DEVICE float clean(float logit) { return ::fmaxf(logit, -INFINITY); }

template <typename Type>
TQ_DEVICE float element_of(const LogitRow<Type>& row, int id) {
  return id < row.size ? clean(Type::widen(row.data[id])) : -INFINITY;
}

template <typename Type, int kCount>
TQ_DEVICE void divide(const LogitRow<Type>& row, float (&values)[kCount]) {
  if (row.divisor == 1.0f) return;
  TQ_UNROLL
  for (int n = 0; n < kCount; ++n) values[n] /= row.divisor;
}

// The id of element `i` of load `j` of a lane.
template <typename Type>
TQ_DEVICE int id_in_tile(int tile, int j, int lane, int i) {
  return tile * kTile + (j * simt::kWarp + lane) * kPerLoad<Type> + i;
}

template <typename Type>
TQ_DEVICE bool is_whole(const LogitRow<Type>& row, int tile) {
  return row.is_aligned && (tile + 1) * kTile <= row.size;
}

// The kPerLoad values that `lane` holds of load j; -inf past the end of the row.
template <typename Type>
TQ_DEVICE void load_part(const LogitRow<Type>& row, int tile, int j, int lane, float (&values)[kPerLoad<Type>]) {
  const int first = id_in_tile<Type>(tile, j, lane, 0);
  if (is_whole(row, tile)) {
    const simt::Quad quad = simt::load_quad(row.data + first);
    TQ_UNROLL
    for (int i = 0; i < kPerLoad<Type>; ++i) values[i] = clean(Type::unpack(quad, i));
  } else {
    TQ_UNROLL
    for (int i = 0; i < kPerLoad<Type>; ++i) values[i] = element_of(row, first + i);
  }
  divide(row, values);
}

// Loads everything that this lane holds of a tile; all loads are under way before the first is used.
template <typename Type>
TQ_DEVICE void load_tile(const LogitRow<Type>& row, int tile, float (&values)[kPerLane]) {
  constexpr int kCount = kPerLoad<Type>;
  if (is_whole(row, tile)) {
    simt::Quad quads[kLoads<Type>];
    TQ_UNROLL
    for (int j = 0; j < kLoads<Type>; ++j) {
      quads[j] = simt::load_quad(row.data + id_in_tile<Type>(tile, j, simt::lane(), 0));
    }
    TQ_UNROLL
    for (int n = 0; n < kPerLane; ++n) values[n] = clean(Type::unpack(quads[n / kCount], n % kCount));
  } else {
    TQ_UNROLL
    for (int n = 0; n < kPerLane; ++n) {
      values[n] = element_of(row, id_in_tile<Type>(tile, n / kCount, simt::lane(), n % kCount));
    }
  }
  divide(row, values);
}

// exp((x - peak) * inverse_temperature) summed over a lane's values in a fixed order; 0 for -inf.
TQ_DEVICE float sum_of_exps(const float (&values)[kPerLane], float peak, float inverse_temperature) {
  float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  TQ_UNROLL
  for (int n = 0; n < kPerLane; ++n) parts[n % 4] += simt::exp_fast((values[n] - peak) * inverse_temperature);
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

TQ_DEVICE float max_of(const float (&values)[kPerLane]) {
  float peak = -INFINITY;
  TQ_UNROLL
  for (int n = 0; n < kPerLane; ++n) peak = ::fmaxf(peak, values[n]);
  return peak;
}

// Peak and sum of exp(x - peak) of a tile, on every lane.
TQ_DEVICE SoftmaxState<float> state_of_tile(const float (&values)[kPerLane]) {
  const float peak = simt::warp_max(max_of(values));
  if (peak == -INFINITY) return empty_softmax_state<float>();
  return {peak, simt::warp_sum(sum_of_exps(values, peak, 1.0f))};
}

// All tiles of a row as one state, on every lane of a warp; the order does not depend on the group.
TQ_DEVICE SoftmaxState<double> merge_tiles(const SoftmaxState<float>* states, int tiles) {
  float peak = -INFINITY;
  for (int b = simt::lane(); b < tiles; b += simt::kWarp) peak = ::fmaxf(peak, states[b].peak);
  SoftmaxState<double> total{static_cast<double>(simt::warp_max(peak)), 0.0};
  for (int b = simt::lane(); b < tiles; b += simt::kWarp) {
    total.sum += sum_at_peak(SoftmaxState<double>{states[b].peak, states[b].sum}, total.peak);
  }
  total.sum = simt::warp_sum(total.sum);
  return total;
}

}  // namespace tq
