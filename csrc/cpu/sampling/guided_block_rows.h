// A block of a row of logits, each raised by its token's value: the vector part of value_sample_tokens.
// Compiled once for each ISA.
#pragma once

#include "cpu/sampling/logits_row.h"
#include "cpu/sampling/token_mass_rows.h"
#include "cpu/simd/isa.h"

namespace tq {

// A row is reduced in blocks of this many tokens, whatever the number of threads or rows. They are smaller
// than kBlock, because the block that a draw falls into is computed again from its embeddings.
constexpr int64_t kGuidedBlock = 512;
static_assert(kGuidedBlock <= kBlock && kGuidedBlock % kGroup == 0);

inline int64_t num_guided_blocks(int64_t size) { return (size + kGuidedBlock - 1) / kGuidedBlock; }

// y = x + product * inverse_alpha; its law is that of y * inverse_temperature.
struct GuidedScale {
  float inverse_alpha;
  float inverse_temperature;
};

struct GuidedBlock {
  // The peak of x and the sum of exp(x - peak).
  SoftmaxState<float> prior;
  // The peak of y and the sum of its masses exp((y - peak) * inverse_temperature).
  SoftmaxState<float> guided;
  // The sum of mass * ((y - guided.peak) * inverse_temperature - (x - prior.peak)).
  float moment;
  // Whether the value of every token whose x is above -inf is finite.
  bool is_finite;
};

struct KeptMoment {
  double mass;
  double moment;
};

#define TQ_DECLARE(isa)                                                                                               \
  namespace isa {                                                                                                     \
  /* guided[i] = y of token i of `row`, at most kGuidedBlock tokens, NaN as -inf. `products` can be read, and \
     `guided` written, up to a whole group. */       \
  GuidedBlock guide_block(const LogitsRow& row, const float* products, const GuidedScale& scale, float* guided);      \
  /* The mass and the moment of the values of `guided` that are kept, relative to scale.peak and to    \
     `prior_peak`, the peaks of the whole row. */              \
  KeptMoment kept_moment(                                                                                             \
      const LogitsRow& prior, float prior_peak, const float* guided, const MassScale& scale, const KeptValues& kept); \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
