#include "cpu/attention_rows.h"

#include "cpu/logit_rows.h"
#include "cpu/simd.h"
#include "cpu/transcendental.h"

namespace tq {
namespace TQ_ISA {

namespace {

// A tile of kTileRows x kTileVectors accumulators, its operands beside it, fills the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
#else
constexpr int kTileRows = 2;
constexpr int kTileVectors = 2;
#endif
constexpr int kScoreRows = 6;

// c [rows, 16 * vectors] (+)= a [rows, depth] @ b [depth, 16 * vectors]
template <int kRows, int kVectors, bool kAccumulate>
TQ_INLINE void multiply_tile(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride) {
  F32x16 sums[kRows][kVectors];
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      sums[row][v] = kAccumulate ? load(c + row * c_stride + v * kLanes) : F32x16{};
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    F32x16 right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + i * b_stride + v * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const F32x16 left = broadcast(a[row * a_stride + i]);
      for (int v = 0; v < kVectors; ++v) sums[row][v] += left * right[v];
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int v = 0; v < kVectors; ++v) store(c + row * c_stride + v * kLanes, sums[row][v]);
  }
}

template <int kVectors, bool kAccumulate>
void multiply_column(
    int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
    int64_t c_stride) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    multiply_tile<kTileRows, kVectors, kAccumulate>(
        a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride);
  }
  for (; row + 2 <= rows; row += 2) {
    multiply_tile<2, kVectors, kAccumulate>(
        a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride);
  }
  if (row < rows) {
    multiply_tile<1, kVectors, kAccumulate>(
        a + row * a_stride, a_stride, b, b_stride, depth, c + row * c_stride, c_stride);
  }
}

// c [rows, width] (+)= a [rows, depth] @ b [depth, width]; width is a multiple of 16.
template <bool kAccumulate>
void multiply(
    int64_t rows, int64_t width, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
    float* c, int64_t c_stride) {
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= width; column += kTileVectors * kLanes) {
    multiply_column<kTileVectors, kAccumulate>(rows, a, a_stride, b + column, b_stride, depth, c + column, c_stride);
  }
  for (; column < width; column += kLanes) {
    multiply_column<1, kAccumulate>(rows, a, a_stride, b + column, b_stride, depth, c + column, c_stride);
  }
}

// to [16, 64-strided] = from [16, stride] transposed: to[i * kKeysPerBlock + j] = from[j * stride + i].
TQ_INLINE void transpose_16x16(const float* from, int64_t stride, float* to) {
#if defined(__AVX512F__)
  __m512 r[16];
  __m512 t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(t[i + half]);
      const __m512d b = _mm512_castps_pd(t[i + half + 2]);
      r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // r[4 * q + c]: rows 4q to 4q + 3, columns c, c + 4, c + 8, c + 12, one in each 128-bit part.
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 high_odd = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * kKeysPerBlock, _mm512_shuffle_f32x4(low, high, 0x88));
    _mm512_storeu_ps(to + (c + 8) * kKeysPerBlock, _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm512_storeu_ps(to + (c + 4) * kKeysPerBlock, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(to + (c + 12) * kKeysPerBlock, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
#else
  for (int j = 0; j < 16; ++j) {
    for (int i = 0; i < 16; ++i) to[i * kKeysPerBlock + j] = from[j * stride + i];
  }
#endif
}

// Positions [begin, end) of one side of a segment as floats with a row stride of `*stride`: where
// they lie if they are such already, else widened into `room`.
const float* rows_as_floats(
    const void* base, int64_t base_stride, ElementType type, int64_t head_size, int64_t begin, int64_t end,
    float* room, int64_t* stride) {
  const int64_t padded = padded_head(head_size);
  if (type == ElementType::kFloat32 && padded == head_size) {
    *stride = base_stride;
    return static_cast<const float*>(base) + begin * base_stride;
  }
  const int64_t bytes = type == ElementType::kFloat32 ? 4 : 2;
  for (int64_t j = begin; j < end; ++j) {
    widen_padded(
        static_cast<const char*>(base) + j * base_stride * bytes, type, head_size, room + (j - begin) * padded);
  }
  *stride = padded;
  return room;
}

// scores [rows, 64] of few queries: a dot product for each key.
void score_few(
    const float* q, int64_t rows, int64_t width, const float* keys, int64_t key_stride, int64_t count,
    float* scores) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t row = 0; row < rows; ++row) {
      F32x16 sum = {};
      for (int64_t i = 0; i < width; i += kLanes) sum += load(q + row * width + i) * load(keys + j * key_stride + i);
      scores[row * kKeysPerBlock + j] = add_lanes(sum);
    }
  }
}

// The keys of a block with the positions as columns, [head_size, 64]; zero beyond `count`.
void transpose_keys(const float* keys, int64_t stride, int64_t count, int64_t head_size, float* to) {
  const int64_t width = padded_head(head_size);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t i = 0; i < width; i += kLanes) {
      transpose_16x16(keys + j * stride + i, stride, to + i * kKeysPerBlock + j);
    }
  }
  if (j == kKeysPerBlock) return;
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t column = j; column < kKeysPerBlock; ++column) {
      to[i * kKeysPerBlock + column] = column < count ? keys[column * stride + i] : 0.0f;
    }
  }
}

// Scores of one query become weights relative to its new peak; what it had is rescaled to that.
TQ_INLINE void soften(
    const QueryTile& tile, int64_t m, int64_t begin, int64_t end, const ScoreTransform& transform, float* scores) {
  constexpr int kVectors = kKeysPerBlock / kLanes;
  const int64_t first = tile.first_seen[m] > begin ? tile.first_seen[m] - begin : 0;
  const int64_t last = tile.end_seen[m] < end ? tile.end_seen[m] - begin : end - begin;
  const F32x16 lowest = broadcast(kMinusInfinity);
  const I32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const bool sees_all = first == 0 && last == kKeysPerBlock;
  F32x16 x[kVectors];
  F32x16 best = lowest;
  for (int v = 0; v < kVectors; ++v) {
    x[v] = load(scores + v * kLanes) * transform.scale;
    if (transform.softcap != 0.0f) x[v] = transform.softcap * tanh_of(x[v] / transform.softcap);
    if (!sees_all) {
      const I32x16 position = lane + v * kLanes;
      const I32x16 is_seen = (position >= static_cast<int32_t>(first)) & (position < static_cast<int32_t>(last));
      x[v] = select(is_seen, x[v], lowest);
    }
    best = max_or_second(x[v], best);
  }
  const float block_peak = reduce_max(best);
  const float peak = block_peak > tile.peaks[m] ? block_peak : tile.peaks[m];
  // Nothing seen so far: any finite peak will do, and every weight is 0 (or NaN, for a NaN score).
  const F32x16 peaks = broadcast(peak == kMinusInfinity ? 0.0f : peak);
  F32x16 mass = load(tile.masses + m * kLanes);
  if (peak != tile.peaks[m]) {
    const F32x16 shrink = exp_nonpositive(broadcast(tile.peaks[m]) - peaks);
    mass *= shrink;
    float* const out = tile.out + m * padded_head(tile.head_size);
    for (int64_t i = 0; i < tile.head_size; i += kLanes) store(out + i, load(out + i) * shrink);
    tile.peaks[m] = peak;
  }
  for (int v = 0; v < kVectors; ++v) {
    const F32x16 weight = select(x[v] == x[v], exp_nonpositive(x[v] - peaks), x[v]);
    store(scores + v * kLanes, weight);
    mass += weight;
  }
  store(tile.masses + m * kLanes, mass);
}

}  // namespace

void start_queries(const QueryTile& tile) {
  const int64_t width = padded_head(tile.head_size);
  for (int64_t i = 0; i < tile.count * width; i += kLanes) store(tile.out + i, F32x16{});
  for (int64_t m = 0; m < tile.count; ++m) {
    tile.peaks[m] = kMinusInfinity;
    store(tile.masses + m * kLanes, F32x16{});
  }
}

void attend_block(
    const QueryTile& tile, const KeySegment& segment, int64_t begin, int64_t end, bool is_few,
    const ScoreTransform& transform, const AttentionScratch& scratch) {
  const int64_t width = padded_head(tile.head_size);
  const int64_t count = end - begin;
  int64_t key_stride;
  int64_t value_stride;
  float* const key_room = is_few ? scratch.keys : scratch.values;
  const float* keys = rows_as_floats(
      segment.keys, segment.key_stride, segment.type, tile.head_size, begin, end, key_room, &key_stride);
  if (!is_few) {
    transpose_keys(keys, key_stride, count, tile.head_size, scratch.keys);
    keys = scratch.keys;
  }
  const float* const values = rows_as_floats(
      segment.values, segment.value_stride, segment.type, tile.head_size, begin, end, scratch.values, &value_stride);
  for (int64_t m = 0; m < tile.count; m += kScoreRows) {
    const int64_t rows = tile.count - m < kScoreRows ? tile.count - m : kScoreRows;
    const float* const q = tile.q + m * width;
    if (is_few) {
      score_few(q, rows, width, keys, key_stride, count, scratch.scores);
    } else {
      multiply<false>(
          rows, kKeysPerBlock, q, width, keys, kKeysPerBlock, tile.head_size, scratch.scores, kKeysPerBlock);
    }
    for (int64_t row = 0; row < rows; ++row) {
      soften(tile, m + row, begin, end, transform, scratch.scores + row * kKeysPerBlock);
    }
    multiply<true>(
        rows, width, scratch.scores, kKeysPerBlock, values, value_stride, count, tile.out + m * width, width);
  }
}

void finish_query(const QueryTile& tile, int64_t m, ElementType type, void* out, float* lse) {
  const double mass = reduce_sum(load(tile.masses + m * kLanes));
  *lse = mass == 0.0 ? kMinusInfinity : static_cast<float>(tile.peaks[m] + __builtin_log(mass));
  const float share = mass == 0.0 ? 0.0f : static_cast<float>(1.0 / mass);
  const float* const from = tile.out + m * padded_head(tile.head_size);
  for (int64_t i = 0; i < tile.head_size; i += kLanes) {
    alignas(64) float values[kLanes];
    store(values, load(from + i) * share);
    const int64_t left = tile.head_size - i < kLanes ? tile.head_size - i : kLanes;
    for (int64_t lane = 0; lane < left; ++lane) {
      if (type == ElementType::kFloat32) {
        static_cast<float*>(out)[i + lane] = values[lane];
      } else {
        static_cast<uint16_t*>(out)[i + lane] =
            type == ElementType::kBFloat16 ? bfloat16_from(values[lane]) : half_from(values[lane]);
      }
    }
  }
}

void widen_padded(const void* from, ElementType type, int64_t size, float* to) {
  widen(from, type, size, to);
  for (int64_t i = size; i < padded_head(size); ++i) to[i] = 0.0f;
}

}  // namespace TQ_ISA
}  // namespace tq
