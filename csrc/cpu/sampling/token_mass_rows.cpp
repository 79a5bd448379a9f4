#include "cpu/sampling/token_mass_rows.h"

#include "cpu/sampling/load_logits.h"
#include "cpu/simd/add_exp.h"

namespace tq {
namespace TQ_ISA {

namespace {

// The mass of -inf is exactly 0.
TQ_INLINE F32x16 masses_of(F32x16 values, const MassScale& scale) {
  return exp_nonpositive((values - broadcast(scale.peak)) * scale.inverse_temperature);
}

// A group's masses, within 2 units in the last place where they are above 1e-37.
TQ_INLINE void masses_of_group(const F32x16 (&x)[kParts], const MassScale& scale, F32x16 (&masses)[kParts]) {
  F32x16 shifted[kParts];
  for (int part = 0; part < kParts; ++part) {
    shifted[part] = (x[part] - broadcast(scale.peak)) * scale.inverse_temperature;
    masses[part] = F32x16{};
  }
  add_exp(shifted, masses);
}

// Replaces the values that are not kept by -inf.
TQ_INLINE F32x16 kept_values(F32x16 values, float least, int64_t* ties_left) {
  const F32x16 bound = broadcast(least);
  const uint32_t from_bound = mask_not_lt(values, bound);
  const int64_t num_ties = __builtin_popcount(from_bound & mask_not_lt(bound, values));
  const int64_t num_kept = num_ties < *ties_left ? num_ties : *ties_left;
  *ties_left -= num_kept;
  const F32x16 kept = select((I32x16)(values >= bound), values, broadcast(kMinusInfinity));
  if (num_kept == num_ties) return kept;
  float lanes[kLanes];
  store(lanes, kept);
  for (int64_t lane = kLanes - 1, dropped = num_ties - num_kept; dropped > 0; --lane) {
    if (lanes[lane] != least) continue;
    lanes[lane] = kMinusInfinity;
    --dropped;
  }
  return load(lanes);
}

template <typename Element>
int64_t draw_in_typed_block(
    const LogitsRow& row, int64_t b, const MassScale& scale, const KeptValues& kept, double target) {
  alignas(64) float values[kBlock];
  const Block<Element> block(row, b);
  load_block<Element, false>(block, 1.0f, values);
  int64_t ties_left = kept.num_ties;
  // Finds the vector at which the running mass exceeds the target, or the last one with any mass.
  alignas(64) float masses[kLanes] = {};
  int64_t first_lane = 0;
  double running = 0.0;
  double after = 0.0;
  for (int64_t i = 0; i < block.count && !(after > target); i += kLanes) {
    const F32x16 mass = masses_of(kept_values(load(values + i), kept.least, &ties_left), scale);
    const double before = after;
    after += reduce_sum(mass);
    if (!(after > before)) continue;
    store(masses, mass);
    first_lane = i;
    running = before;
  }
  int last_with_mass = 0;
  for (int lane = 0; lane < kLanes && !(running > target); ++lane) {
    running += masses[lane];
    if (masses[lane] > 0.0f) last_with_mass = lane;
  }
  return block.first + first_lane + last_with_mass;
}

template <typename Element>
int64_t find_in_typed_block(const LogitsRow& row, int64_t b, float value) {
  const Block<Element> block(row, b);
  for (int64_t i = 0; i < block.count; ++i) {
    if (Element::scalar(block.data[i]) == value) return block.first + i;
  }
  return block.first;
}

template <typename Element>
KeptMass kept_mass_of_typed_block(const LogitsRow& row, int64_t b, const MassScale& scale, float least) {
  const Block<Element> block(row, b);
  const F32x16 bound = broadcast(least);
  F32x16 sums[kParts] = {};
  I32x16 num_ties = {};
  for (int64_t group = 0; group < block.num_groups; ++group) {
    F32x16 x[kParts], masses[kParts];
    block.load(group, x);
    masses_of_group(x, scale, masses);
    for (int part = 0; part < kParts; ++part) {
      sums[part] += (F32x16)((I32x16)masses[part] & (I32x16)(bound < x[part]));
      num_ties = num_ties - (I32x16)(x[part] == bound);
    }
  }
  KeptMass kept{reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])), 0};
  for (int lane = 0; lane < kLanes; ++lane) kept.num_ties += num_ties[lane];
  return kept;
}

template <typename Element>
double masses_from_typed(
    const LogitsRow& row, const MassScale& scale, const float (&bounds)[kNumBounds], double (&masses)[kNumBounds]) {
  double total = 0.0;
  for (int i = 0; i < kNumBounds; ++i) masses[i] = 0.0;
  for (int64_t b = 0; b < num_blocks(row.size); ++b) {
    const Block<Element> block(row, b);
    F32x16 all[kParts] = {};
    F32x16 sums[kNumBounds] = {};
    for (int64_t group = 0; group < block.num_groups; ++group) {
      F32x16 x[kParts], terms[kParts];
      block.load(group, x);
      for (int part = 0; part < kParts; ++part) x[part] = clean(x[part]);
      masses_of_group(x, scale, terms);
      for (int part = 0; part < kParts; ++part) {
        all[part] += terms[part];
        for (int i = 0; i < kNumBounds; ++i) {
          sums[i] = add_where_not_lt(sums[i], x[part], broadcast(bounds[i]), terms[part]);
        }
      }
    }
    total += reduce_sum((all[0] + all[1]) + (all[2] + all[3]));
    for (int i = 0; i < kNumBounds; ++i) masses[i] += reduce_sum(sums[i]);
  }
  return total;
}

// Writes the lanes of `x` that the mask names one after the other, and returns how many; a whole vector is
// written.
TQ_INLINE int64_t compress(F32x16 x, uint32_t mask, float* to) {
#if defined(__AVX512F__)
  store(to, (F32x16)_mm512_maskz_compress_ps(mask, (__m512)x));
#else
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (uint32_t left = mask; left != 0; left &= left - 1) *to++ = lanes[__builtin_ctz(left)];
#endif
  return __builtin_popcount(mask);
}

template <typename Element>
ValueRange keep_between_typed(const LogitsRow& row, float low, float high, float* kept) {
  F32x16 lowest_negated = broadcast(kMinusInfinity);
  F32x16 highest = broadcast(kMinusInfinity);
  int64_t count = 0;
  for (int64_t b = 0; b < num_blocks(row.size); ++b) {
    const Block<Element> block(row, b);
    for (int64_t group = 0; group < block.num_groups; ++group) {
      F32x16 x[kParts];
      block.load(group, x);
      for (int part = 0; part < kParts; ++part) {
        const F32x16 value = clean(x[part]);
        const uint32_t mask = mask_not_lt(value, broadcast(low)) & ~mask_not_lt(value, broadcast(high));
        if (mask == 0) continue;
        count += compress(value, mask, kept + count);
      }
    }
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    lowest_negated = max_or_second(0.0f - load(kept + i), lowest_negated);
    highest = max_or_second(load(kept + i), highest);
  }
  ValueRange range{count, -reduce_max(lowest_negated), reduce_max(highest)};
  for (; i < count; ++i) {
    if (kept[i] < range.lowest) range.lowest = kept[i];
    if (kept[i] > range.highest) range.highest = kept[i];
  }
  return range;
}

}  // namespace

int64_t find_in_block(const LogitsRow& row, int64_t b, float value) {
  TQ_BY_ELEMENT(row, find_in_typed_block<Element>(row, b, value));
}

int64_t draw_in_block(const LogitsRow& row, int64_t b, const MassScale& scale, const KeptValues& kept, double target) {
  TQ_BY_ELEMENT(row, draw_in_typed_block<Element>(row, b, scale, kept, target));
}

KeptMass kept_mass_of_block(const LogitsRow& row, int64_t b, const MassScale& scale, float least) {
  TQ_BY_ELEMENT(row, kept_mass_of_typed_block<Element>(row, b, scale, least));
}

double masses_from(
    const LogitsRow& row, const MassScale& scale, const float (&bounds)[kNumBounds], double (&masses)[kNumBounds]) {
  TQ_BY_ELEMENT(row, masses_from_typed<Element>(row, scale, bounds, masses));
}

ValueRange keep_between(const LogitsRow& row, float low, float high, float* kept) {
  TQ_BY_ELEMENT(row, keep_between_typed<Element>(row, low, high, kept));
}

float mass_of_value(const MassScale& scale, float value) {
  const F32x16 x[kParts] = {broadcast(value), broadcast(value), broadcast(value), broadcast(value)};
  F32x16 masses[kParts];
  masses_of_group(x, scale, masses);
  return masses[0][0];
}

}  // namespace TQ_ISA
}  // namespace tq
