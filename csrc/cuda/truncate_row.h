// Top-k and top-p of a row: a least value that is kept, and among equals the last id that is kept.
//
// The least value is found by bisection over the bits of floats. Only the elements near the peak matter for
// it, so they are brought together first: the largest elements that the first pass left of each lane, the
// marks, give a bound that the least value cannot lie below, and one pass copies what lies above it into
// shared memory. Where that is more than there is room for, passes over the row narrow the range until the
// rest of it fits.
#pragma once

#include "common/ordered_key.h"
#include "cuda/row_passes.h"

namespace tq {

// What a cut keeps: elements from the largest down until their number, or their mass, reaches `wanted`.
struct Goal {
  double wanted;
  bool is_by_mass;
  TQ_DEVICE bool is_reached(const Goal& goal, const Amount& amount) {
    return (goal.is_by_mass ? amount.mass : static_cast<double>(amount.count)) >= goal.wanted;
  }
};

TQ_DEVICE bool is_narrow(const Bracket& bracket, const Goal& goal) {
  if (bracket.high - bracket.low <= 1 || bracket.count - bracket.above.count <= 1) return true;
  return !goal.is_by_mass && static_cast<double>(bracket.count) == goal.wanted;
}

// Sums of masses in shared memory are integers, so that they depend on no order. A mass is at most 1, and
// from 2^-17 on it is a whole number of units.
constexpr float kUnitsOfMass = 1099511627776.0f;  // 2^40

TQ_DEVICE uint64_t units_of(const Weigh& weigh, float x) {
  return static_cast<uint64_t>(simt::exp_fast((x - weigh.peak) * weigh.inverse_temperature) * kUnitsOfMass);
}

// The amount of the listed elements in [least, end), to every thread of the leader, which calls it together.
TQ_DEVICE Amount weigh_list(
    const DrawScratch& scratch, int size, const Weigh& weigh, float least, float end, bool is_by_mass, int round) {
  uint64_t units = 0;
  int count = 0;
  for (int i = simt::thread(); i < size; i += simt::num_threads()) {
    const float x = scratch.nearby[i];
    if (x < least || x >= end) continue;
    ++count;
    if (is_by_mass) units += units_of(weigh, x);
  }
  units = simt::warp_sum(units);
  count = simt::warp_sum(count);
  uint64_t* const warp_units = scratch.warp_units + round * simt::kWarp;
  int* const warp_counts = scratch.warp_counts + round * simt::kWarp;
  if (simt::lane() == 0) {
    warp_units[simt::thread() / simt::kWarp] = units;
    warp_counts[simt::thread() / simt::kWarp] = count;
  }
  simt::sync_block();
  units = 0;
  count = 0;
  for (int w = 0; w < simt::num_threads() / simt::kWarp; ++w) {
    units += warp_units[w];
    count += warp_counts[w];
  }
  return {static_cast<double>(units) / kUnitsOfMass, count};
}

// Narrows the bracket by the first `size` listed elements, among which are all of the bracket's. The leader
// calls it.
TQ_DEVICE Bracket
narrow_by_list(const DrawScratch& scratch, int size, const Weigh& weigh, const Goal& goal, Bracket bracket) {
  const Amount above = bracket.above;
  const float end = value_from_ordered_bits(bracket.high);
  for (int round = 0; !is_narrow(bracket, goal); round ^= 1) {
    const uint32_t middle = bracket.low + (bracket.high - bracket.low) / 2;
    const Amount listed =
        weigh_list(scratch, size, weigh, value_from_ordered_bits(middle), end, goal.is_by_mass, round);
    const Amount amount{above.mass + listed.mass, above.count + listed.count};
    if (Goal::is_reached(goal, amount)) {
      bracket.low = middle;
      bracket.count = amount.count;
    } else {
      bracket.high = middle;
      bracket.above = amount;
    }
  }
  // The partial sums of the last round may be read still.
  simt::sync_block();
  return bracket;
}

// Calls `make()`, a Bracket, on the threads of the leader, and returns what it gave to the whole group.
template <typename Type, typename Make>
TQ_DEVICE Bracket ask_leader(RowPasses<Type>& passes, const Make& make) {
  ++passes.tellings;
  if (simt::group_rank() == 0) {
    const Bracket made = make();
    if (simt::thread() == 0) passes.scratch.told[passes.tellings % 2] = made;
  }
  simt::sync_group();
  return simt::of_leader(passes.scratch.told)[passes.tellings % 2];
}

// Lanes that share a mark, so that the marks of all tiles have room.
TQ_DEVICE int lanes_per_mark(int tiles, int room) {
  int lanes = 1;
  while (lanes < simt::kWarp && tiles * (simt::kWarp / lanes) > room) lanes *= 2;
  return lanes;
}

// Leaves the marks of a tile, of which this lane's largest element is `largest`; the whole warp calls it.
template <typename Type>
TQ_DEVICE void leave_marks(const RowPasses<Type>& passes, int tile, float largest) {
  const int lanes = lanes_per_mark(passes.tiles, passes.room);
  for (int mask = 1; mask < lanes; mask *= 2) largest = ::fmaxf(largest, simt::shuffle_xor(largest, mask));
  if (simt::lane() % lanes != 0) return;
  simt::of_leader(passes.scratch.nearby)[(tile * simt::kWarp + simt::lane()) / lanes] = largest;
}

// A value that the least one is hardly below, from what the first pass left, or the lower end of the
// bracket. The marks are elements of the row: if those from a value on reach the goal, so do all elements
// from there on. By mass there is a second bound: all elements below it together have at most the mass that
// may be cut off.
template <typename Type>
TQ_DEVICE uint32_t
find_bound(RowPasses<Type>& passes, const Weigh& weigh, double mass, const Goal& goal, const Bracket& whole) {
  const int num_marks = passes.tiles * simt::kWarp / lanes_per_mark(passes.tiles, passes.room);
  const auto narrow_by_marks = [&] { return narrow_by_list(passes.scratch, num_marks, weigh, goal, whole); };
  uint32_t bound = ask_leader(passes, narrow_by_marks).low;
  const double spare = mass - goal.wanted;
  if (goal.is_by_mass && spare > 0.0) {
    const double depth = ::log(static_cast<double>(passes.row.size) / spare) / weigh.inverse_temperature;
    const uint32_t tail = ordered_bits(static_cast<float>(weigh.peak - depth));
    bound = tail > bound && tail < whole.high ? tail : bound;
  }
  return bound;
}

// The value in the middle of the bracket; after some steps, in which the range of elements has shrunk to what
// matters, or never will, the middle of the bits.
TQ_DEVICE uint32_t middle_of(const Bracket& bracket, int step) {
  constexpr int kStepsByValue = 8;
  const float low = value_from_ordered_bits(bracket.low);
  if (step >= kStepsByValue || low == -INFINITY) return bracket.low + (bracket.high - bracket.low) / 2;
  const uint32_t middle = ordered_bits(0.5f * low + 0.5f * value_from_ordered_bits(bracket.high));
  if (middle <= bracket.low) return bracket.low + 1;
  return middle < bracket.high ? middle : bracket.high - 1;
}

// Narrows the bracket by passes over the row until what is left of it is nearby, or nothing is left to do.
template <typename Type>
TQ_DEVICE void narrow_by_passes(
    RowPasses<Type>& passes, const Weigh& weigh, const Goal& goal, uint32_t bound, Bracket& bracket) {
  const uint32_t lowest = bracket.low;
  for (int step = 0; !is_narrow(bracket, goal); ++step) {
    if (passes.nearby_low <= bracket.low && bracket.high <= passes.nearby_high) return;
    uint32_t middle = step == 0 && bound > bracket.low ? bound : middle_of(bracket, step);
    if (bracket.count - bracket.above.count <= passes.room) middle = bracket.low;
    Weigh tried = weigh;
    tried.least = value_from_ordered_bits(middle);
    tried.last_tie = middle == lowest ? weigh.last_tie : INT32_MAX;
    const float end = value_from_ordered_bits(bracket.high);
    const Amount amount = weigh_row(passes, tried, end, passes.room > 0);
    const bool is_lower = middle == bracket.low || Goal::is_reached(goal, amount);
    const bool fits = passes.room > 0 && amount.count - bracket.above.count <= passes.room;
    // What was collected replaced what had been nearby.
    passes.nearby_low = fits ? middle : 0;
    passes.nearby_high = fits ? bracket.high : 0;
    if (is_lower) {
      bracket.low = middle;
      bracket.count = amount.count;
    } else {
      bracket.high = middle;
      bracket.above = amount;
    }
  }
}

// The id of the `wanted`-th element (from 1) that equals `least`.
template <typename Type>
TQ_DEVICE int find_tie(RowPasses<Type>& passes, float least, int wanted) {
  passes.round ^= 1;
  int* const counts = simt::of_leader(passes.scratch.counts) + passes.round * passes.tiles;
  for (int tile = simt::warp_of_group(); tile < passes.tiles; tile += simt::warps_of_group()) {
    int count = 0;
    for (int j = 0; may_reach(passes, tile, least) && j < kLoads<Type>; ++j) {
      float values[kPerLoad<Type>];
      load_part(passes.row, tile, j, simt::lane(), values);
      TQ_UNROLL
      for (int i = 0; i < kPerLoad<Type>; ++i) count += values[i] == least;
    }
    count = simt::warp_sum(count);
    if (simt::lane() == 0) counts[tile] = count;
  }
  simt::sync_group();
  const double target = static_cast<double>(wanted) - 0.5;
  const Place place = find_place(passes.tiles, target, [&](int tile) { return static_cast<double>(counts[tile]); });
  const int size = passes.row.size;
  return find_in_tile(passes.row, place.item < 0 ? 0 : place.item, target - place.before, [&](float x, int id) {
    return x == least && id < size ? 1.0 : 0.0;
  });
}

// Narrows `weigh`, which keeps `kept`, to the largest least value whose kept amount reaches the goal, and
// returns how many elements it then keeps.
template <typename Type>
TQ_DEVICE int cut(RowPasses<Type>& passes, Weigh& weigh, const Amount& kept, const Goal& goal) {
  const Weigh whole = weigh;
  Bracket bracket{ordered_bits(whole.least), ordered_bits(whole.peak) + 1, kept.count, {0.0, 0}};
  const bool has_marks = passes.room > 0 && passes.collections == 0;
  const uint32_t bound = has_marks ? find_bound(passes, whole, kept.mass, goal, bracket) : bracket.low;
  narrow_by_passes(passes, whole, goal, bound, bracket);
  if (!is_narrow(bracket, goal)) {
    bracket = ask_leader(passes, [&] {
      const int size = passes.scratch.num_nearby[passes.collections % 2];
      return narrow_by_list(passes.scratch, size, whole, goal, bracket);
    });
  }
  const float least = value_from_ordered_bits(bracket.low);
  const bool is_narrower = least > whole.least;
  weigh.least = least;
  weigh.last_tie = is_narrower ? INT32_MAX : whole.last_tie;
  const int most = bracket.count - bracket.above.count;
  if (most <= 1 || (!goal.is_by_mass && static_cast<double>(bracket.count) == goal.wanted)) return bracket.count;
  // All of [low, high) are equal: the lower ids come first.
  double ties = goal.wanted - static_cast<double>(bracket.above.count);
  if (goal.is_by_mass) {
    const double mass_of_tie = static_cast<double>(simt::exp_fast((least - whole.peak) * whole.inverse_temperature));
    ties = mass_of_tie > 0.0 ? ::ceil((goal.wanted - bracket.above.mass) / mass_of_tie) : 1.0;
  }
  const int num_ties = ties < 1.0 ? 1 : ties < static_cast<double>(most) ? static_cast<int>(ties) : most;
  weigh.last_tie = find_tie(passes, least, num_ties);
  return bracket.above.count + num_ties;
}

// The mass of the `count` elements that `weigh` keeps.
template <typename Type>
TQ_DEVICE double mass_of_kept(RowPasses<Type>& passes, const Weigh& weigh, int count) {
  const uint32_t least = ordered_bits(weigh.least);
  const uint32_t end = ordered_bits(weigh.peak) + 1;
  if (least < passes.nearby_low || end > passes.nearby_high) return weigh_row(passes, weigh, INFINITY, false).mass;
  const auto weigh_listed = [&] {
    const int size = passes.scratch.num_nearby[passes.collections % 2];
    const float next = value_from_ordered_bits(least + 1);
    const float last = value_from_ordered_bits(end);
    return Bracket{0, 0, 0, weigh_list(passes.scratch, size, weigh, next, last, true, 0)};
  };
  const Amount above = ask_leader(passes, weigh_listed).above;
  const double ties = static_cast<double>(count - above.count);
  return above.mass + ties * simt::exp_fast((weigh.least - weigh.peak) * weigh.inverse_temperature);
}

// The mass of the whole row.
template <typename Type>
TQ_DEVICE double mass_of_row(const RowPasses<Type>& passes, const Weigh& weigh) {
  const SoftmaxState<float>* const states = simt::of_leader(passes.scratch.states);
  const float* const sums = simt::of_leader(passes.scratch.tempered_sums);
  return total_of(passes.tiles, [&](int tile) { return mass_of_tile(states[tile], sums[tile], weigh); });
}

// Cuts by top-k first, then by top-p of what is left. The whole group calls it.
template <typename Type>
TQ_DEVICE void truncate(RowPasses<Type>& passes, Weigh& weigh, int64_t top_k, double top_p) {
  Amount kept{0.0, passes.row.size};
  const bool has_top_k = top_k > 0 && top_k < kept.count;
  // One place in the code serves both cuts, because it is large.
  for (int goal = has_top_k ? 0 : 1; goal < (top_p < 1.0 ? 2 : 1); ++goal) {
    const bool is_by_mass = goal == 1;
    if (is_by_mass) kept.mass = has_top_k ? mass_of_kept(passes, weigh, kept.count) : mass_of_row(passes, weigh);
    const double wanted = is_by_mass ? top_p * kept.mass : static_cast<double>(top_k);
    kept.count = cut(passes, weigh, kept, Goal{wanted, is_by_mass});
  }
  weigh_row(passes, weigh, INFINITY, false);
}

}  // namespace tq
