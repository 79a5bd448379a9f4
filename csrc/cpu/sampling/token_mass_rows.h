// Masses exp((x - peak) * inverse_temperature) of a row's values, and draws from them. Compiled once for
// each ISA.
#pragma once

#include "cpu/sampling/logits_row.h"
#include "cpu/simd/isa.h"

namespace tq {

// The parameters of exp((x - peak) * inverse_temperature).
struct MassScale {
  float peak;
  float inverse_temperature;
};

// Every value above `least`, and of those that equal it the first `num_ties` by id.
struct KeptValues {
  float least;
  int64_t num_ties;
};

struct KeptMass {
  double above;
  int64_t num_ties;
};

struct ValueRange {
  int64_t count;
  float lowest;
  float highest;
};

constexpr int kNumBounds = 5;

#define TQ_DECLARE(isa)                                                                                               \
  namespace isa {                                                                                                     \
  /* The first id of block b whose value is exactly `value`, which must be there. */                                  \
  int64_t find_in_block(const LogitsRow& row, int64_t b, float value);                                                \
  /* The first id of block b at which the running mass of the kept values exceeds `target`; where    \
     rounding lets none, the last id with any mass. */                \
  int64_t draw_in_block(                                                                                              \
      const LogitsRow& row, int64_t b, const MassScale& scale, const KeptValues& kept, double target);                \
  /* The mass of the values of block b above `least`, and how many equal it. */                                       \
  KeptMass kept_mass_of_block(const LogitsRow& row, int64_t b, const MassScale& scale, float least);                  \
  /* masses[i]: of all values that are at least bounds[i]; the return value: of all that there are. */                \
  double masses_from(                                                                                                 \
      const LogitsRow& row, const MassScale& scale, const float (&bounds)[kNumBounds], double (&masses)[kNumBounds]); \
  /* The values from `low` on and below `high`, in any order. `kept` has room for the row and a group more; \
     it may be the row itself. */         \
  ValueRange keep_between(const LogitsRow& row, float low, float high, float* kept);                                  \
  /* The mass of one value, as the others compute it. */                                                              \
  float mass_of_value(const MassScale& scale, float value);                                                           \
  }
TQ_FOR_EACH_ISA(TQ_DECLARE)
#undef TQ_DECLARE

}  // namespace tq
