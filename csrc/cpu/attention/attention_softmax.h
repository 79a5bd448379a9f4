// The running softmax of attention, some queries at a time. Included only by attention_rows.cpp.
#pragma once

#include "cpu/attention/attention_rows.h"
#include "cpu/simd/exp_and_tanh.h"
#include "cpu/simd/floats.h"
#include "cpu/simd/transpose.h"

namespace tq {
namespace TQ_ISA {

static_assert(kScoreRows <= kLanes, "the peaks of queries whose scores are in the scratch are one vector");

// cap * tanh(score * scale) for scores [rows, 64], of which 16 * kVectors are there.
template <int kVectors>
static void cap_scores(const ScoreTransform& transform, int64_t rows, float* scores) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      float* const at = scores + row * kKeysPerBlock + v * kLanes;
      store(at, transform.cap * tanh_of(load(at) * transform.scale));
    }
  }
}

// Multiplies the scores of query m by `scale` and sets those of keys that it does not see to -inf; returns
// the largest in each lane.
template <int kVectors>
TQ_INLINE F32x16 mask_scores(const QueryTile& tile, int64_t m, int64_t begin, float scale, float* scores) {
  constexpr int64_t kCount = kVectors * kLanes;
  const int64_t first = tile.first_seen[m] - begin;
  const int64_t last = tile.end_seen[m] - begin;
  F32x16 x[kVectors];
  for (int v = 0; v < kVectors; ++v) x[v] = load(scores + v * kLanes) * scale;
  if (first > 0 || last < kCount) {
    const auto least = static_cast<int32_t>(first < 0 ? 0 : first);
    const auto most = static_cast<int32_t>(last < kCount ? last : kCount);
    alignas(64) static constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I32x16 lane = (I32x16)load_words(kNumbers);
    for (int v = 0; v < kVectors; ++v) {
      const I32x16 position = lane + v * kLanes;
      x[v] = select((position >= least) & (position < most), x[v], broadcast(kMinusInfinity));
    }
  }
  F32x16 best = broadcast(kMinusInfinity);
  for (int v = 0; v < kVectors; ++v) {
    store(scores + v * kLanes, x[v]);
    best = max_or_second(x[v], best);
  }
  return best;
}

// Turns the scores [rows, 64] of the queries from m on, for the keys from `begin` on, into weights relative
// to the new peaks. shrinks [16] is what the outputs so far must be multiplied by.
template <int kVectors>
static void soften(
    const QueryTile& tile, int64_t m, int64_t rows, int64_t begin, const ScoreTransform& transform, float* scores,
    float* shrinks) {
  // Scores are in units of log 2, which makes the weights powers of 2.
  if (transform.cap != 0.0f) cap_scores<kVectors>(transform, rows, scores);
  const float scale = transform.cap != 0.0f ? 1.0f : transform.scale;
  F32x16 best[kLanes];
  for (int64_t row = 0; row < rows; ++row) {
    best[row] = mask_scores<kVectors>(tile, m + row, begin, scale, scores + row * kKeysPerBlock);
  }
  for (int64_t row = rows; row < kLanes; ++row) best[row] = broadcast(kMinusInfinity);
  // The lanes beyond `rows` belong to other queries and stay as they are.
  const F32x16 before = load(tile.peaks + m);
  const F32x16 peaks = max_or_second(max_across(best), before);
  store(tile.peaks + m, peaks);
  // A query that has seen nothing takes any finite peak, and each of its weights is 0 (or NaN, for a NaN
  // score).
  const F32x16 finite = select(peaks == broadcast(kMinusInfinity), F32x16{}, peaks);
  store(shrinks, exp2_nonpositive(before - finite));
  float new_peaks[kLanes];
  store(new_peaks, finite);
  for (int64_t row = 0; row < rows; ++row) {
    float* const own = scores + row * kKeysPerBlock;
    float* const masses = tile.masses + (m + row) * kLanes;
    F32x16 mass = load(masses) * shrinks[row];
    for (int v = 0; v < kVectors; ++v) {
      const F32x16 weight = exp2_nonpositive(load(own + v * kLanes) - new_peaks[row]);
      store(own + v * kLanes, weight);
      mass += weight;
    }
    store(masses, mass);
  }
}

// `count` keys at most are seen.
static void soften_block(
    const QueryTile& tile, int64_t m, int64_t rows, int64_t begin, int64_t count, const ScoreTransform& transform,
    float* scores, float* shrinks) {
  switch ((count + kLanes - 1) / kLanes) {
    case 1:
      return soften<1>(tile, m, rows, begin, transform, scores, shrinks);
    case 2:
      return soften<2>(tile, m, rows, begin, transform, scores, shrinks);
    case 3:
      return soften<3>(tile, m, rows, begin, transform, scores, shrinks);
    default:
      return soften<kKeysPerBlock / kLanes>(tile, m, rows, begin, transform, scores, shrinks);
  }
}

}  // namespace TQ_ISA
}  // namespace tq
