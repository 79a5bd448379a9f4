// Finds the values of a row that a top-p cut keeps.
#pragma once

#include <vector>

#include "cpu/sampling/token_mass_rows.h"

namespace tq {

// Returns the smallest set, from the largest value down and by id among equals, whose mass is at least
// top_p of the mass of the whole row; at least one value. scale.peak is the row's largest value, finite.
// `room` may grow.
KeptValues find_top_p(const LogitsRow& row, const MassScale& scale, double top_p, std::vector<float>& room);

}  // namespace tq
