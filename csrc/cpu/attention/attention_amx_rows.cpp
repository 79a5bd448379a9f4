// Attention in tiles. Scores: S^T [keys, queries] = K [keys, d] Q^T takes the keys as they lie in memory; the
// softmax then runs down the columns, sixteen queries a vector. Outputs: O [queries, d] = P [queries, keys]
// V [keys, d], for which the weights are transposed, and of the values each number is put beside that of the
// next key.
//
// A tile adds the products of all its columns in one order, so that the result of a query depends on neither
// the queries beside it nor their number. A query that sees nothing of a block is left as it is.
#include "cpu/attention/attention_amx_rows.h"

#if defined(__AVX512F__)

#include "cpu/simd/amx.h"
#include "cpu/simd/exp_and_tanh.h"
#include "cpu/simd/floats.h"
#include "cpu/simd/transpose.h"

namespace tq {
namespace TQ_ISA {

namespace {

// A tile holds 32 numbers in each of its rows.
constexpr int64_t kDepth = 32;
constexpr int64_t kTileWords = kAmxTileRows * kLanes;
// A block of keys is scored at once: the sums are in four tile registers.
static_assert(kKeysPerBlock == 4 * kAmxTileRows, "four tiles of keys");

// 2^x for x <= 0, 0 for -inf, within 4e-6 of itself: weights are rounded to bf16 after it. 2^(x - floor(x)) is a
// polynomial that is exact at both ends. NaN stays NaN.
TQ_INLINE F32x16 exp2_for_bf16(F32x16 x) {
  constexpr int kRoundDown = 0x09;
  const F32x16 rest = (F32x16)_mm512_reduce_ps((__m512)x, kRoundDown);
  F32x16 poly = rest * 0.0135557475f + 0.0520323701f;
  poly = poly * rest + 0.241379768f;
  poly = poly * rest + 0.693032146f;
  poly = poly * rest + 1.0f;
  return (F32x16)_mm512_scalef_ps((__m512)poly, (__m512)x);
}

// The work on one key, in units that are about as long, through which reading is spread: its value is paired once,
// the rest is done for each tile of queries.
constexpr int64_t kPairingWork = 2;
constexpr int64_t kProductWork = 3;  // of the scores, and of the values
constexpr int64_t kSoftmaxWork = 4;  // of each of the two rounds
constexpr int64_t kTileWork = 2 * (kProductWork + kSoftmaxWork);

// Which keys of a block the sixteen queries of a tile see, by position.
struct Sight {
  I32x16 first;
  I32x16 end;

  TQ_ALWAYS_INLINE __mmask16 of(int64_t position) const {
    const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(position));
    return _mm512_cmple_epi32_mask((__m512i)first, at) & _mm512_cmplt_epi32_mask(at, (__m512i)end);
  }
};

// Numbers [i, i + 32) of a bf16 row, zero beyond its end.
TQ_INLINE __m512i load_numbers(const char* row, int64_t i, int64_t size) {
  if (i + kDepth <= size) return _mm512_loadu_si512(row + i * 2);
  return _mm512_maskz_loadu_epi16((1u << (size - i)) - 1, row + i * 2);
}

// The rows [count, head_size] of a block of values as [depth / 2, width] words, each of two keys. Sixteen words
// hold the numbers 0 to 3, 8 to 11, 16 to 19 and 24 to 27 of 32, the next sixteen the others; unpack_amx_queries
// puts them in order. Zero for the keys from `count` to `depth`.
void pair_values(
    const char* values, int64_t stride, int64_t count, int64_t depth, int64_t head_size, ReadingPace& pace, float* to) {
  const int64_t width = padded_for_amx(head_size);
  for (int64_t key = 0; key < depth; key += 2, to += width) {
    pace.step(2 * kPairingWork);
    const char* const from = values + key * stride * 2;
    for (int64_t i = 0; i < width; i += kDepth) {
      const __m512i a = key < count ? load_numbers(from, i, head_size) : _mm512_setzero_si512();
      const __m512i b = key + 1 < count ? load_numbers(from + stride * 2, i, head_size) : _mm512_setzero_si512();
      _mm512_store_si512(to + i, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + i + kLanes, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// Several products of tiles that share a factor, summed over `steps`. The strides are in bytes: from one row to the
// next, from one tile to the next, and from one step to the next.
struct TileProducts {
  const float* shared;  // tiles, one after the other
  const char* others;
  int64_t row_stride;
  int64_t tile_stride;
  int64_t step_stride;
  int64_t steps;
  int64_t work;  // of each product, for the pace
  char* sums;
  int64_t sums_row_stride;
  int64_t sums_tile_stride;
};

template <int kTile, int kOther, bool kSharesLeft>
TQ_INLINE void multiply_tile(const TileProducts& x, const char* other, ReadingPace& pace) {
  pace.step(x.work);
  amx_load<kOther>(other, x.row_stride);
  kSharesLeft ? amx_multiply<kTile, 4, kOther>() : amx_multiply<kTile, kOther, 4>();
}

template <int kTile, bool kAdds>
TQ_INLINE void start_sums(const TileProducts& x) {
  kAdds ? amx_load<kTile>(x.sums + kTile * x.sums_tile_stride, x.sums_row_stride) : amx_clear<kTile>();
}

template <int kTile>
TQ_INLINE void store_sums(const TileProducts& x) {
  amx_store<kTile>(x.sums + kTile * x.sums_tile_stride, x.sums_row_stride);
}

// kAdds: to the sums that are there.
template <int kTiles, bool kSharesLeft, bool kAdds>
TQ_INLINE void multiply_tiles(const TileProducts& x, ReadingPace& pace) {
  start_sums<0, kAdds>(x);
  start_sums<1, kAdds>(x);
  if (kTiles > 2) start_sums<2, kAdds>(x);
  if (kTiles > 2) start_sums<3, kAdds>(x);
  const char* others = x.others;
  for (int64_t step = 0; step < x.steps; ++step, others += x.step_stride) {
    amx_load<4>(x.shared + step * kTileWords, kAmxRowBytes);
    multiply_tile<0, 5, kSharesLeft>(x, others, pace);
    multiply_tile<1, 6, kSharesLeft>(x, others + x.tile_stride, pace);
    if (kTiles == 2) continue;
    multiply_tile<2, 7, kSharesLeft>(x, others + 2 * x.tile_stride, pace);
    multiply_tile<3, 5, kSharesLeft>(x, others + 3 * x.tile_stride, pace);
  }
  store_sums<0>(x);
  store_sums<1>(x);
  if (kTiles > 2) store_sums<2>(x);
  if (kTiles > 2) store_sums<3>(x);
}

// Takes one segment into some queries, block by block.
class AmxSegment {
 public:
  AmxSegment(
      const AmxQueries& queries, int64_t first, int64_t end, const KeySegment& segment, const ScoreTransform& transform,
      const AmxScratch& scratch, ReadAhead& ahead)
      : queries_(queries),
        first_(first),
        end_(end),
        segment_(segment),
        transform_(transform),
        scratch_(scratch),
        ahead_(ahead),
        steps_(queries.width / kDepth) {}

  void attend(int64_t first_key, int64_t end_key) {
    const AmxRegisters registers;
    for (int64_t begin = first_key; begin < end_key; begin += kKeysPerBlock) {
      attend_block(begin, begin + kKeysPerBlock < end_key ? begin + kKeysPerBlock : end_key);
    }
  }

 private:
  void attend_block(int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    const int64_t first_tile = first_ / kAmxQueries;
    const int64_t end_tile = (end_ + kAmxQueries - 1) / kAmxQueries;
    segment_.reach(ahead_, queries_.head_size, begin);
    ReadingPace pace(
        ahead_, segment_.lines(queries_.head_size, count),
        count * (kPairingWork + (end_tile - first_tile) * kTileWork));
    const char* const values = segment_.values + begin * segment_.value_stride * 2;
    pair_values(values, segment_.value_stride, count, whole(count), queries_.head_size, pace, scratch_.values);
    copy_keys(begin, count);
    for (int64_t tile = first_tile; tile < end_tile; ++tile) attend_tile(tile, begin, end, pace);
  }

  // Copies keys that do not fill the tiles, with zeros around them.
  void copy_keys(int64_t begin, int64_t count) {
    is_copied_ = count < kKeysPerBlock || queries_.width != queries_.head_size;
    for (int64_t key = 0; is_copied_ && key < whole(count); ++key) {
      const char* const from = segment_.keys + (begin + key) * segment_.key_stride * 2;
      for (int64_t i = 0; i < queries_.width; i += kDepth) {
        const __m512i numbers = key < count ? load_numbers(from, i, queries_.head_size) : _mm512_setzero_si512();
        _mm512_store_si512(scratch_.keys + (key * queries_.width + i) / 2, numbers);
      }
    }
  }

  static int64_t whole(int64_t count) { return (count + kDepth - 1) / kDepth * kDepth; }

  // The sixteen queries of a tile, of which those outside of [first_, end_) see nothing.
  void attend_tile(int64_t tile, int64_t begin, int64_t end, ReadingPace& pace) {
    const int64_t at = tile * kAmxQueries;
    const Sight sight = sight_of(at);
    const __m512i from = _mm512_max_epi32((__m512i)sight.first, _mm512_set1_epi32(static_cast<int32_t>(begin)));
    const __m512i to = _mm512_min_epi32((__m512i)sight.end, _mm512_set1_epi32(static_cast<int32_t>(end)));
    const __mmask16 sees = _mm512_cmplt_epi32_mask(from, to);
    if (sees == 0) return;
    const int64_t most = _mm512_mask_reduce_max_epi32(sees, to);
    const int64_t depth = whole(most - begin);
    score(tile, begin, depth, pace);
    const bool sees_all = _mm512_mask_reduce_max_epi32(sees, from) == begin &&
                          _mm512_mask_reduce_min_epi32(sees, to) == begin + depth && sees == 0xffff;
    const F32x16 shrink = sees_all ? soften<false>(at, begin, depth, sees, sight, pace)
                                   : soften<true>(at, begin, depth, sees, sight, pace);
    add_values(tile, depth, sees, shrink, pace);
  }

  Sight sight_of(int64_t at) const {
    alignas(64) static constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i number = _mm512_add_epi32(_mm512_load_si512(kNumbers), _mm512_set1_epi32(static_cast<int32_t>(at)));
    const __mmask16 is_ours = _mm512_cmpge_epi32_mask(number, _mm512_set1_epi32(static_cast<int32_t>(first_))) &
                              _mm512_cmplt_epi32_mask(number, _mm512_set1_epi32(static_cast<int32_t>(end_)));
    // What fills up the last tile sees as much as the last query, so that it needs no mask.
    const __mmask16 is_filling = end_ == queries_.count
                                     ? _mm512_cmpge_epi32_mask(number, _mm512_set1_epi32(static_cast<int32_t>(end_)))
                                     : __mmask16{0};
    const auto seen = [&](const int32_t* of) {
      const __m512i ours = _mm512_maskz_loadu_epi32(is_ours, of + at);
      return (I32x16)_mm512_mask_mov_epi32(ours, is_filling, _mm512_set1_epi32(of[end_ - 1]));
    };
    return {seen(queries_.first_seen), seen(queries_.end_seen)};
  }

  void score(int64_t tile, int64_t begin, int64_t depth, ReadingPace& pace) const {
    const int64_t stride = 2 * (is_copied_ ? queries_.width : segment_.key_stride);
    const TileProducts products{
        queries_.q + tile * steps_ * kTileWords,
        is_copied_ ? reinterpret_cast<const char*>(scratch_.keys) : segment_.keys + begin * stride,
        stride,
        kAmxTileRows * stride,
        kAmxRowBytes,
        steps_,
        kAmxTileRows * kProductWork / steps_,
        reinterpret_cast<char*>(scratch_.scores),
        kAmxRowBytes,
        kAmxTileRows * kAmxRowBytes};
    depth > kDepth ? multiply_tiles<4, false, false>(products, pace) : multiply_tiles<2, false, false>(products, pace);
  }

  // Turns the scores of `depth` keys from `begin` on into weights relative to the new peaks; returns what the
  // outputs so far must be multiplied by.
  template <bool kMasked>
  F32x16 soften(int64_t at, int64_t begin, int64_t depth, __mmask16 sees, const Sight& sight, ReadingPace& pace) {
    constexpr int kChains = 4;
    float* const scores = scratch_.scores;
    float scale = transform_.scale;
    if (transform_.cap != 0.0f) {
      for (int64_t i = 0; i < depth * kLanes; i += kLanes) {
        store(scores + i, transform_.cap * tanh_of(load(scores + i) * scale));
      }
      scale = 1.0f;
    }
    F32x16 best[kChains];
    for (int chain = 0; chain < kChains; ++chain) best[chain] = broadcast(kMinusInfinity);
    for (int64_t key = 0; key < depth; key += kChains) {
      for (int chain = 0; chain < kChains; ++chain) {
        F32x16 x = load(scores + (key + chain) * kLanes) * scale;
        if (kMasked) x = kept(sight.of(begin + key + chain), x, kMinusInfinity);
        best[chain] = max_or_second(x, best[chain]);
      }
      pace.step(kChains * kSoftmaxWork);
    }
    const F32x16 before = load(queries_.peaks + at);
    const F32x16 peak =
        max_or_second(max_or_second(best[0], best[1]), max_or_second(max_or_second(best[2], best[3]), before));
    // A query that has seen nothing takes any finite peak, and each of its weights is 0 (or NaN, for a NaN score).
    const F32x16 finite = select(peak == broadcast(kMinusInfinity), F32x16{}, peak);
    const F32x16 shrink = exp2_nonpositive(before - finite);
    F32x16 masses[kChains] = {};
    for (int64_t step = 0; step < depth; step += kDepth) {
      float* const weights_of_step = scratch_.weights + step / 2 * kLanes;
      for (int64_t key = step; key < step + kDepth; key += kChains) {
        F32x16 weights[kChains];
        for (int chain = 0; chain < kChains; ++chain) {
          weights[chain] = exp2_for_bf16(load(scores + (key + chain) * kLanes) * scale - finite);
          if (kMasked) weights[chain] = kept(sight.of(begin + key + chain), weights[chain], 0.0f);
          masses[chain] += weights[chain];
        }
        store_pair(weights[0], weights[1], scratch_.weights + key / 2 * kLanes);
        store_pair(weights[2], weights[3], scratch_.weights + (key / 2 + 1) * kLanes);
        pace.step(kChains * kSoftmaxWork);
      }
      transpose_16x16_words(reinterpret_cast<const char*>(weights_of_step), kAmxRowBytes, weights_of_step, kLanes);
    }
    const F32x16 mass = load(queries_.masses + at) * shrink + ((masses[0] + masses[1]) + (masses[2] + masses[3]));
    _mm512_mask_storeu_ps(queries_.masses + at, sees, (__m512)mass);
    _mm512_mask_storeu_ps(queries_.peaks + at, sees, (__m512)peak);
    return shrink;
  }

  // x in the lanes of the mask, `otherwise` in the others.
  TQ_INLINE F32x16 kept(__mmask16 mask, F32x16 x, float otherwise) {
    return (F32x16)_mm512_mask_mov_ps((__m512)broadcast(otherwise), mask, (__m512)x);
  }

  // Stores two keys' weights as bf16, rounded to nearest even: those of a query side by side.
  TQ_INLINE void store_pair(F32x16 first, F32x16 second, float* to) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    // Written in assembly because the intrinsic needs flags under which the compiler may use the instruction
    // elsewhere.
    __m512i halves;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(first), "v"(second));
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves));
  }

  // out = out * shrink + P V for the queries that saw something.
  void add_values(int64_t tile, int64_t depth, __mmask16 sees, F32x16 shrink, ReadingPace& pace) const {
    const int64_t width = queries_.width;
    float* const out = queries_.out + tile * kAmxQueries * width;
    alignas(64) float shrinks[kLanes];
    store(shrinks, shrink);
    // A product with 1 is left out, which most are.
    const __mmask16 shrinks_it = _mm512_mask_cmp_ps_mask(sees, (__m512)shrink, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
    for (int64_t query = 0; query < kAmxQueries; ++query) {
      if (!(shrinks_it >> query & 1)) continue;
      for (int64_t i = query * width; i < (query + 1) * width; i += kLanes) {
        store(out + i, load(out + i) * shrinks[query]);
      }
    }
    if (sees == 0xffff) return add_products(depth, out, pace);
    copy_queries(0xffff, out, scratch_.out);
    add_products(depth, scratch_.out, pace);
    copy_queries(sees, scratch_.out, out);
  }

  // to [16, width] = from, for some of the queries of a tile.
  void copy_queries(__mmask16 some, const float* from, float* to) const {
    for (int64_t query = 0; query < kAmxQueries; ++query, from += queries_.width, to += queries_.width) {
      if (!(some >> query & 1)) continue;
      for (int64_t i = 0; i < queries_.width; i += kLanes) store(to + i, load(from + i));
    }
  }

  // out [16, width] += P V
  void add_products(int64_t depth, float* out, ReadingPace& pace) const {
    const int64_t width = queries_.width;
    const int64_t row_bytes = width * 4;
    for (int64_t i = 0; i < width;) {
      const TileProducts products{
          scratch_.weights,
          reinterpret_cast<const char*>(scratch_.values + i),
          row_bytes,
          kAmxRowBytes,
          kAmxTileRows * row_bytes,
          depth / kDepth,
          kDepth * kProductWork * kAmxTileRows / width,
          reinterpret_cast<char*>(out + i),
          row_bytes,
          kAmxRowBytes};
      const bool is_four = width - i >= 4 * kLanes;
      is_four ? multiply_tiles<4, true, true>(products, pace) : multiply_tiles<2, true, true>(products, pace);
      i += is_four ? 4 * kLanes : 2 * kLanes;
    }
  }

  const AmxQueries& queries_;
  int64_t first_;
  int64_t end_;
  const KeySegment& segment_;
  const ScoreTransform& transform_;
  const AmxScratch& scratch_;
  ReadAhead& ahead_;
  int64_t steps_;
  bool is_copied_ = false;  // the keys of the block are
};

}  // namespace

void start_amx_queries(const AmxQueries& queries, const float* q_pairs) {
  const int64_t words = queries.width / 2;
  const int64_t queries_in_tiles = padded(queries.count);
  for (int64_t m = 0; m < queries_in_tiles; m += kLanes) {
    for (int64_t i = 0; i < words; i += kLanes) {
      __m512 rows[kLanes];
      for (int64_t row = 0; row < kLanes; ++row) {
        rows[row] = m + row < queries.count ? _mm512_load_ps(q_pairs + (m + row) * words + i) : _mm512_setzero_ps();
      }
      transpose_in_registers(rows);
      for (int64_t row = 0; row < kLanes; ++row) _mm512_store_ps(queries.q + m * words + (i + row) * kLanes, rows[row]);
    }
    store(queries.peaks + m, broadcast(kMinusInfinity));
    store(queries.masses + m, F32x16{});
  }
  for (int64_t i = 0; i < queries_in_tiles * queries.width; i += kLanes) store(queries.out + i, F32x16{});
}

void attend_amx_segment(
    const AmxQueries& queries, int64_t first, int64_t end, const KeySegment& segment, int64_t first_key,
    int64_t end_key, const ScoreTransform& transform, const AmxScratch& scratch, ReadAhead& ahead) {
  AmxSegment(queries, first, end, segment, transform, scratch, ahead).attend(first_key, end_key);
}

void unpack_amx_queries(const AmxQueries& queries, const QueryTile& tile) {
  // The words of pair_values, and those sixteen words later, in order.
  alignas(64) static constexpr int32_t kOrder[2][kLanes] = {
      {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23},
      {8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31}};
  const int64_t width = padded(queries.head_size);
  for (int64_t m = 0; m < queries.count; ++m) {
    const float* const from = queries.out + m * queries.width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 low = _mm512_load_ps(from + i / kDepth * kDepth);
      const __m512 high = _mm512_load_ps(from + i / kDepth * kDepth + kLanes);
      const __m512i order = _mm512_load_si512(kOrder[i / kLanes % 2]);
      _mm512_store_ps(tile.out + m * width + i, _mm512_permutex2var_ps(low, order, high));
    }
    tile.peaks[m] = queries.peaks[m];
    store(tile.masses + m * kLanes, F32x16{});
    tile.masses[m * kLanes] = queries.masses[m];
  }
}

}  // namespace TQ_ISA
}  // namespace tq

#endif
