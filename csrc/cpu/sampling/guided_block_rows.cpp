#include "cpu/sampling/guided_block_rows.h"

#include "cpu/sampling/load_logits.h"
#include "cpu/simd/add_exp.h"

namespace tq {
namespace TQ_ISA {

namespace {

constexpr float kLowestFinite = -__FLT_MAX__;

// The tokens of a block as floats, NaN as -inf, filled up with -inf to a whole group.
template <typename Element>
TQ_INLINE void load_prior(const Block<Element>& block, float* prior) {
  load_block<Element, false>(block, 1.0f, prior);
  for (int64_t i = (block.count + kLanes - 1) / kLanes * kLanes; i < block.num_groups * kGroup; i += kLanes) {
    store(prior + i, broadcast(kMinusInfinity));
  }
}

TQ_INLINE float top_of(const F32x16 (&parts)[kParts]) {
  return reduce_max(max_or_second(max_or_second(parts[0], parts[1]), max_or_second(parts[2], parts[3])));
}

TQ_INLINE double sum_of(const F32x16 (&parts)[kParts]) {
  return reduce_sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

struct Peaks {
  float prior;
  float guided;
  bool is_finite;
};

// Fills `guided`, and finds the peaks of the block.
TQ_INLINE Peaks raise(const float* prior, const float* products, float inverse_alpha, int64_t groups, float* guided) {
  const F32x16 scale = broadcast(inverse_alpha);
  const F32x16 lowest = broadcast(kLowestFinite);
  F32x16 prior_tops[kParts], guided_tops[kParts], faults[kParts] = {};
  for (int part = 0; part < kParts; ++part) prior_tops[part] = guided_tops[part] = broadcast(kMinusInfinity);
  for (int64_t i = 0; i < groups * kGroup; i += kGroup) {
    for (int part = 0; part < kParts; ++part) {
      const F32x16 x = load(prior + i + part * kLanes);
      const F32x16 value = load(products + i + part * kLanes) * scale;
      const F32x16 y = clean(x + value);
      // A finite value times 0 is 0, any other is NaN, which the sum keeps.
      faults[part] = add_where_not_lt(faults[part], x, lowest, value * 0.0f);
      prior_tops[part] = max_or_second(x, prior_tops[part]);
      guided_tops[part] = max_or_second(y, guided_tops[part]);
      store(guided + i + part * kLanes, y);
    }
  }
  return {top_of(prior_tops), top_of(guided_tops), sum_of(faults) == 0.0};
}

// A block without any finite number takes 0 as the peak of its exponentials: -inf - -inf would be NaN.
TQ_INLINE float reference_of(float peak) { return peak == kMinusInfinity ? 0.0f : peak; }

template <typename Element>
GuidedBlock guide_typed_block(const LogitsRow& row, const float* products, const GuidedScale& scale, float* guided) {
  alignas(64) float prior[kGuidedBlock];
  const Block<Element> block(row, 0);
  load_prior(block, prior);
  const Peaks peaks = raise(prior, products, scale.inverse_alpha, block.num_groups, guided);

  const F32x16 prior_peak = broadcast(reference_of(peaks.prior));
  const F32x16 guided_peak = broadcast(reference_of(peaks.guided));
  const F32x16 inverse_temperature = broadcast(scale.inverse_temperature);
  const F32x16 lowest = broadcast(kLowestExponent);
  F32x16 prior_sums[kParts] = {}, guided_sums[kParts] = {}, moments[kParts] = {};
  for (int64_t i = 0; i < block.num_groups * kGroup; i += kGroup) {
    F32x16 x[kParts], y[kParts], shifted[kParts], differences[kParts], masses[kParts];
    for (int part = 0; part < kParts; ++part) {
      x[part] = load(prior + i + part * kLanes) - prior_peak;
      y[part] = (load(guided + i + part * kLanes) - guided_peak) * inverse_temperature;
      shifted[part] = y[part];
      differences[part] = y[part] - x[part];
      masses[part] = F32x16{};
    }
    add_exp(x, prior_sums);
    add_exp(y, masses);
    for (int part = 0; part < kParts; ++part) {
      guided_sums[part] += masses[part];
      // Where the exponential is cut off at the lowest, the mass is 0 and the difference may be anything.
      moments[part] = add_where_not_lt(moments[part], shifted[part], lowest, masses[part] * differences[part]);
    }
  }
  const bool has_prior = peaks.prior != kMinusInfinity;
  const bool has_guided = peaks.guided != kMinusInfinity;
  return {
      {peaks.prior, has_prior ? static_cast<float>(sum_of(prior_sums)) : 0.0f},
      {peaks.guided, has_guided ? static_cast<float>(sum_of(guided_sums)) : 0.0f},
      has_guided ? static_cast<float>(sum_of(moments)) : 0.0f,
      peaks.is_finite};
}

// Adds the tokens of one block that are kept; the ties of the least value come in the order of their ids.
template <typename Element>
TQ_INLINE void add_kept_block(
    const LogitsRow& row, float prior_peak, const float* guided, const MassScale& scale, float least,
    int64_t* ties_left, KeptMoment* kept) {
  alignas(64) float prior[kGuidedBlock];
  const Block<Element> block(row, 0);
  load_prior(block, prior);
  const F32x16 bound = broadcast(least);
  F32x16 sums = {}, moments = {};
  for (int64_t i = 0; i < block.count; i += kLanes) {
    F32x16 y = broadcast(kMinusInfinity);
    if (i + kLanes <= block.count) {
      y = load(guided + i);
    } else {
      float last[kLanes];
      store(last, y);
      for (int64_t lane = 0; i + lane < block.count; ++lane) last[lane] = guided[i + lane];
      y = load(last);
    }
    uint32_t ties = mask_not_lt(y, bound) & mask_not_lt(bound, y);
    uint32_t dropped = 0;
    for (; ties != 0; ties &= ties - 1) {
      if (*ties_left > 0) {
        --*ties_left;
      } else {
        dropped |= ties & -ties;
      }
    }
    const uint32_t stays = mask_not_lt(y, bound) & ~dropped;
    if (stays == 0) continue;
    float lanes[kLanes];
    store(lanes, y);
    for (uint32_t left = ~stays & 0xffffu; left != 0; left &= left - 1) lanes[__builtin_ctz(left)] = kMinusInfinity;
    const F32x16 shifted = (load(lanes) - broadcast(scale.peak)) * scale.inverse_temperature;
    const F32x16 masses = exp_nonpositive(shifted);
    const F32x16 differences = shifted - (load(prior + i) - broadcast(prior_peak));
    sums += masses;
    moments = add_where_not_lt(moments, shifted, broadcast(kLowestExponent), masses * differences);
  }
  kept->mass += reduce_sum(sums);
  kept->moment += reduce_sum(moments);
}

template <typename Element>
KeptMoment kept_typed_moment(
    const LogitsRow& prior, float prior_peak, const float* guided, const MassScale& scale, const KeptValues& kept) {
  KeptMoment found{0.0, 0.0};
  int64_t ties_left = kept.num_ties;
  for (int64_t first = 0; first < prior.size; first += kGuidedBlock) {
    const int64_t count = prior.size - first < kGuidedBlock ? prior.size - first : kGuidedBlock;
    const LogitsRow block{static_cast<const typename Element::Stored*>(prior.data) + first, prior.type, count};
    add_kept_block<Element>(block, prior_peak, guided + first, scale, kept.least, &ties_left, &found);
  }
  return found;
}

}  // namespace

GuidedBlock guide_block(const LogitsRow& row, const float* products, const GuidedScale& scale, float* guided) {
  TQ_BY_ELEMENT(row, guide_typed_block<Element>(row, products, scale, guided));
}

KeptMoment kept_moment(
    const LogitsRow& prior, float prior_peak, const float* guided, const MassScale& scale, const KeptValues& kept) {
  TQ_BY_ELEMENT(prior, kept_typed_moment<Element>(prior, prior_peak, guided, scale, kept));
}

}  // namespace TQ_ISA
}  // namespace tq
