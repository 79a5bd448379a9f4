#include "cpu/sampling/top_p.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

namespace tq {

namespace {

constexpr int64_t kAllTies = std::numeric_limits<int64_t>::max();
// More than a row can hold.
constexpr double kMostTies = 0x1p62;

// Masses at lower exponents count as 0.
constexpr float kLowestExponent = -87.0f;

// Returns a first guess of the exponent of the cut: all values so far below the peak have, together, no
// more than the mass that may be left out. Only speed depends on the guess.
float likely_exponent(double top_p, int64_t size) {
  const double most = std::max(1.0 - top_p, 1e-30) / static_cast<double>(size);
  return std::max(static_cast<float>(std::log(most)), kLowestExponent);
}

float value_at_exponent(const MassScale& scale, float exponent) {
  return std::max(scale.peak + exponent / scale.inverse_temperature, -FLT_MAX);
}

// Returns how many values of this `mass` are needed on top of the mass above them: at least one.
int64_t count_ties(double above, double mass, double wanted) {
  if (!((wanted - above) / mass < kMostTies)) return kAllTies;
  double count = std::max(std::ceil((wanted - above) / mass), 1.0);
  // The quotient is rounded, but the cut is defined by comparing sums: compare them.
  if (count > 1.0 && above + (count - 1.0) * mass >= wanted) count -= 1.0;
  if (above + count * mass < wanted) count += 1.0;
  return static_cast<int64_t>(count);
}

}  // namespace

// Searches for the cut: measures the mass above a few bounds, goes on with the values between the two
// bounds where the mass is reached, and ends when these values are all equal.
KeptValues find_top_p(const LogitsRow& row, const MassScale& scale, double top_p, std::vector<float>& room) {
  LogitsRow rest = row;
  float below = value_at_exponent(scale, kLowestExponent);
  float lowest = value_at_exponent(scale, likely_exponent(top_p, row.size));
  float highest = scale.peak;
  double above = 0.0;
  double wanted = -1.0;
  do {
    float bounds[kNumBounds];
    double masses[kNumBounds];
    for (int i = 0; i < kNumBounds; ++i) {
      const double part = static_cast<double>(i + 1) / kNumBounds;
      bounds[i] = static_cast<float>(lowest + part * (static_cast<double>(highest) - lowest));
    }
    bounds[kNumBounds - 1] = highest;
    const double total = TQ_SELECT_ISA(masses_from)(rest, scale, bounds, masses);
    if (wanted < 0.0) wanted = top_p * total;
    int last = kNumBounds - 1;
    while (last >= 0 && above + masses[last] < wanted) --last;
    if (last == kNumBounds - 1) break;
    above += masses[last + 1];
    room.resize(std::max<size_t>(room.size(), row.size + kGroup));
    const ValueRange range =
        TQ_SELECT_ISA(keep_between)(rest, last < 0 ? below : bounds[last], bounds[last + 1], room.data());
    // Only rounding leads here: the values above were enough.
    if (range.count == 0) return {bounds[last + 1], kAllTies};
    rest = {room.data(), ElementType::kFloat32, range.count};
    below = lowest = range.lowest;
    highest = range.highest;
  } while (lowest < highest);
  return {highest, count_ties(above, TQ_SELECT_ISA(mass_of_value)(scale, highest), wanted)};
}

}  // namespace tq
