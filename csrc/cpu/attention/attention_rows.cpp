#include "cpu/attention/attention_rows.h"

#include "cpu/attention/attention_softmax.h"
#include "cpu/attention/attention_tile.h"
#include "cpu/simd/widen_rows.h"

namespace tq {
namespace TQ_ISA {

namespace {

// Positions [begin, end) of one side of a segment as floats with a row stride of `*stride`: where
// they lie if they are such already, else widened into `room`.
const float* rows_as_floats(
    const char* base, int64_t base_stride, ElementType type, int64_t head_size, int64_t begin, int64_t end, float* room,
    int64_t* stride) {
  const int64_t width = padded(head_size);
  if (type == ElementType::kFloat32 && width == head_size) {
    *stride = base_stride;
    return reinterpret_cast<const float*>(base) + begin * base_stride;
  }
  const int64_t bytes = bytes_of(type);
  for (int64_t j = begin; j < end; ++j) {
    widen_padded(base + j * base_stride * bytes, type, head_size, room + (j - begin) * width);
  }
  *stride = width;
  return room;
}

// The keys of a block with the positions as columns, [padded(head_size), 64]; zero from `count` on to
// the end of a vector. `room` is for sixteen keys.
void transpose_keys(const float* keys, int64_t stride, int64_t count, int64_t head_size, float* room, float* to) {
  const int64_t width = padded(head_size);
  for (int64_t j = 0; j < count; j += kLanes) {
    const float* from = keys + j * stride;
    int64_t from_stride = stride;
    if (count - j < kLanes) {
      for (int64_t i = 0; i < kLanes * width; i += kLanes) {
        const int64_t key = j + i / width;
        store(room + i, key < count ? load(keys + key * stride + i % width) : F32x16{});
      }
      from = room;
      from_stride = width;
    }
    for (int64_t i = 0; i < width; i += kLanes) {
      transpose_16x16(from + i, from_stride, to + i * kKeysPerBlock + j, kKeysPerBlock);
    }
  }
}

// Up to this many dot products are added up one by one, in the order in which add_across adds sixteen.
constexpr int64_t kFewKeys = 4;

// Writes scores [padded(count)] of one query: a dot product for each key.
void score_few(
    const float* q, int64_t width, const float* keys, int64_t key_stride, int64_t count, ReadingPace& pace,
    float* scores) {
  int64_t j = 0;
  const auto dot = [&](int64_t key) __attribute__((always_inline)) {
    pace.step(1);
    F32x16 sum = {};
    for (int64_t i = 0; i < width; i += kLanes) sum += load(q + i) * load(keys + key * key_stride + i);
    return sum;
  };
  for (; j + kLanes <= count; j += kLanes) {
    F32x16 sums[kLanes];
    for (int key = 0; key < kLanes; ++key) sums[key] = dot(j + key);
    store(scores + j, add_across(sums));
  }
  if (j == count) return;
  if (count - j <= kFewKeys) {
    store(scores + j, F32x16{});
    for (int64_t key = j; key < count; ++key) scores[key] = add_lanes(dot(key));
    return;
  }
  F32x16 sums[kLanes] = {};
  for (int64_t key = 0; key < count - j; ++key) sums[key] = dot(j + key);
  store(scores + j, add_across(sums));
}

// out [16 * kVectors] = out * shrink + weights [count] @ values. Even and odd keys have sums of their own,
// so that no addition waits for the one before it.
template <int kVectors>
TQ_INLINE void add_values_of_few(
    const float* weights, float shrink, const float* values, int64_t value_stride, int64_t count, float* out) {
  F32x16 even[kVectors];
  F32x16 odd[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) even[v] = load(out + v * kLanes) * shrink;
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
    for (int v = 0; v < kVectors; ++v) {
      even[v] += weights[j] * load(values + j * value_stride + v * kLanes);
      odd[v] += weights[j + 1] * load(values + (j + 1) * value_stride + v * kLanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    if (j < count) even[v] += weights[j] * load(values + j * value_stride + v * kLanes);
    store(out + v * kLanes, even[v] + odd[v]);
  }
}

void add_row_of_values(
    const float* weights, float shrink, const float* values, int64_t value_stride, int64_t count, int64_t width,
    float* out) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    add_values_of_few<4>(weights, shrink, values + i, value_stride, count, out + i);
  }
  for (; i < width; i += kLanes) {
    add_values_of_few<1>(weights, shrink, values + i, value_stride, count, out + i);
  }
}

// The number of keys that a segment has from `begin` on, at most a block.
TQ_INLINE int64_t keys_from(const KeySegment& segment, int64_t begin) {
  const int64_t left = segment.end - begin;
  return left < 0 ? 0 : left < kKeysPerBlock ? left : kKeysPerBlock;
}

// The operands of a block for attend_operands; its transposed keys are in the scratch. Strides and depths
// in words.
struct Operands {
  const float* q;
  int64_t q_stride;
  int64_t q_depth;
  const float* values;
  int64_t value_stride;
  int64_t value_depth;
};

template <typename Words>
void attend_operands(
    const QueryTile& tile, const KeySegment& segment, const Operands& operands, int64_t begin, int64_t end,
    const ScoreTransform& transform, const AttentionScratch& scratch, ReadAhead& ahead) {
  const int64_t width = padded(tile.head_size);
  const int64_t columns = padded(end - begin);
  const int64_t products = operands.q_depth * columns + operands.value_depth * width;
  ReadingPace pace(ahead, segment.lines(tile.head_size, end - begin), tile.count * products / kLanes);
  for (int64_t m = 0; m < tile.count; m += kScoreRows) {
    const int64_t rows = tile.count - m < kScoreRows ? tile.count - m : kScoreRows;
    const Product scored{
        operands.q + m * operands.q_stride,
        operands.q_stride,
        scratch.keys,
        kKeysPerBlock,
        operands.q_depth,
        scratch.scores,
        kKeysPerBlock,
        nullptr};
    multiply<Words, false>(scored, rows, columns, pace);
    float shrinks[kLanes];
    soften_block(tile, m, rows, begin, end - begin, transform, scratch.scores, shrinks);
    for (int64_t row = 0; row < rows; ++row) Words::pack_weights(scratch.scores + row * kKeysPerBlock);
    const Product weighted{scratch.scores,       kKeysPerBlock,        operands.values, operands.value_stride,
                           operands.value_depth, tile.out + m * width, width,           shrinks};
    multiply<Words, true>(weighted, rows, width, pace);
  }
}

// to[i + lane] = value[lane] as an Element, up to to[size].
template <typename Element>
TQ_INLINE void store_typed(F32x16 value, int64_t i, int64_t size, void* to) {
  auto* const at = static_cast<typename Element::Stored*>(to) + i;
  if (i + kLanes <= size) return Element::store_rounded(at, value);
  for (int64_t lane = 0; lane < size - i; ++lane) at[lane] = Element::rounded(value[lane]);
}

TQ_INLINE void store_as(ElementType type, F32x16 value, int64_t i, int64_t size, void* to) {
  switch (type) {
    case ElementType::kFloat32:
      return store_typed<Float32>(value, i, size, to);
    case ElementType::kBFloat16:
      return store_typed<BFloat16>(value, i, size, to);
    case ElementType::kFloat16:
      return store_typed<Float16>(value, i, size, to);
  }
}

}  // namespace

void start_queries(const QueryTile& tile) {
  const int64_t width = padded(tile.head_size);
  for (int64_t i = 0; i < tile.count * width; i += kLanes) store(tile.out + i, F32x16{});
  for (int64_t m = 0; m < tile.count; ++m) {
    tile.peaks[m] = kMinusInfinity;
    store(tile.masses + m * kLanes, F32x16{});
  }
}

void attend_block(
    const QueryTile& tile, const KeySegment& segment, int64_t begin, int64_t end, const ScoreTransform& transform,
    const AttentionScratch& scratch, ReadAhead& ahead) {
  const int64_t width = padded(tile.head_size);
  const int64_t count = end - begin;
  segment.reach(ahead, tile.head_size, begin);
#if defined(__AVX512F__)
  if (tile.q_pairs != nullptr) {
    const char* const keys = segment.keys + begin * segment.key_stride * 2;
    const char* const values = segment.values + begin * segment.value_stride * 2;
    transpose_key_pairs(keys, segment.key_stride, count, tile.head_size, scratch.room, scratch.keys);
    pair_values(values, segment.value_stride, count, tile.head_size, scratch.values);
    const Operands pairs{tile.q_pairs, width / 2, width / 2, scratch.values, width, (count + 1) / 2};
    return attend_operands<PairWords>(tile, segment, pairs, begin, end, transform, scratch, ahead);
  }
#endif
  int64_t key_stride;
  int64_t value_stride;
  const float* const keys = rows_as_floats(
      segment.keys, segment.key_stride, segment.type, tile.head_size, begin, end, scratch.values, &key_stride);
  transpose_keys(keys, key_stride, count, tile.head_size, scratch.room, scratch.keys);
  const float* const values = rows_as_floats(
      segment.values, segment.value_stride, segment.type, tile.head_size, begin, end, scratch.values, &value_stride);
  const Operands floats{tile.q, width, tile.head_size, values, value_stride, count};
  attend_operands<FloatWords>(tile, segment, floats, begin, end, transform, scratch, ahead);
}

void attend_block_of_few(
    const QueryTile& tile, const KeySegment* segments, int64_t begin, const ScoreTransform& transform,
    const AttentionScratch& scratch, ReadAhead& ahead) {
  const int64_t width = padded(tile.head_size);
  for (int64_t m = 0; m < tile.count; m += kScoreRows) {
    const int64_t rows = tile.count - m < kScoreRows ? tile.count - m : kScoreRows;
    // Queries of one row are neighbours, so widened keys of one serve the next.
    const auto is_next = [&](int64_t row) { return row == 0 || segments[m + row].keys != segments[m + row - 1].keys; };
    int64_t counts[kScoreRows];
    int64_t most = 0;
    const float* keys = nullptr;
    const float* values = nullptr;
    int64_t stride = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const KeySegment& segment = segments[m + row];
      counts[row] = keys_from(segment, begin);
      if (counts[row] > most) most = counts[row];
      if (counts[row] == 0) continue;
      const bool is_read = m + row == 0 || segment.keys != segments[m + row - 1].keys;
      if (is_read) segment.reach(ahead, tile.head_size, begin);
      if (is_next(row)) {
        keys = rows_as_floats(
            segment.keys, segment.key_stride, segment.type, tile.head_size, begin, begin + counts[row], scratch.keys,
            &stride);
      }
      ReadingPace pace(ahead, is_read ? segment.lines(tile.head_size, counts[row]) : 0, counts[row]);
      score_few(
          tile.q + (m + row) * width, width, keys, stride, counts[row], pace, scratch.scores + row * kKeysPerBlock);
    }
    if (most == 0) continue;
    float shrinks[kLanes];
    soften_block(tile, m, rows, begin, most, transform, scratch.scores, shrinks);
    for (int64_t row = 0; row < rows; ++row) {
      const KeySegment& segment = segments[m + row];
      if (counts[row] == 0) continue;
      if (is_next(row)) {
        values = rows_as_floats(
            segment.values, segment.value_stride, segment.type, tile.head_size, begin, begin + counts[row],
            scratch.values, &stride);
      }
      add_row_of_values(
          scratch.scores + row * kKeysPerBlock, shrinks[row], values, stride, counts[row], width,
          tile.out + (m + row) * width);
    }
  }
}

void finish_query(const QueryTile& tile, int64_t m, ElementType type, void* out, float* lse) {
  constexpr double kLog2 = 0.69314718055994531;
  const double mass = reduce_sum(load(tile.masses + m * kLanes));
  *lse = mass == 0.0 ? kMinusInfinity : static_cast<float>(tile.peaks[m] * kLog2 + __builtin_log(mass));
  const float share = mass == 0.0 ? 0.0f : static_cast<float>(1.0 / mass);
  const float* const from = tile.out + m * padded(tile.head_size);
  for (int64_t i = 0; i < tile.head_size; i += kLanes) {
    store_as(type, load(from + i) * share, i, tile.head_size, out);
  }
}

void widen_padded(const void* from, ElementType type, int64_t size, float* to) {
  widen(from, type, size, to);
  for (int64_t i = size; i < padded(size); ++i) to[i] = 0.0f;
}

}  // namespace TQ_ISA
}  // namespace tq
