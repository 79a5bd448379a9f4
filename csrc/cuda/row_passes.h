// Passes over a row of logits by a group of blocks, and what lies in their shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/tile.h"

namespace tq {

// The mass of an element: exp((x - peak) / temperature), 0 for what is cut off.
struct Weigh {
  float peak;
  float inverse_temperature;
  float least;   // what lies below is cut off,
  int last_tie;  // and so are elements equal to `least` with a later id than this
  TQ_DEVICE bool keeps(const Weigh& weigh, float x, int id) {
    return x > weigh.least || (x == weigh.least && id <= weigh.last_tie);
  }
  TQ_DEVICE float mass(const Weigh& weigh, float x, int id) {
    return keeps(weigh, x, id) ? simt::exp_fast((x - weigh.peak) * weigh.inverse_temperature) : 0.0f;
  }
};

struct Amount {
  double mass;
  int count;
};

// Bits of floats [low, high) among which a least value is looked for: `count` elements are kept from `low` on,
// and `above` is what is kept from `high` on.
struct Bracket {
  uint32_t low;
  uint32_t high;
  int count;
  Amount above;
};

// Elements near the peak for which the leader's shared memory has room, where a row may be cut.
constexpr int kNearbyRoom = 4096;

// Shared memory of a block; only the leader's is used. There are two rounds of masses and counts, so that
// one barrier a pass is enough; for the same reason there are two of what only a cut needs.
struct DrawScratch {
  double* masses;  // [2 * tiles]
  SoftmaxState<float>* states;
  float* tempered_sums;  // sums of exp((x - peak of tile) / temperature)
  int* counts;           // [2 * tiles]
  // What follows is there only where a row may be cut, and has room for elements.
  uint64_t* warp_units;  // [2 * 32], of the leader's warps
  int* warp_counts;      // [2 * 32]
  Bracket* told;         // [2], what the leader tells the group
  int* num_nearby;       // [2]
  float* nearby;         // [room]; before it is filled, the marks: the largest elements of lanes
};

TQ_HOST_DEVICE int64_t draw_shared_bytes(int64_t vocab_size, int room) {
  constexpr int64_t kBracket = sizeof(Bracket);
  const int64_t of_cut = 2 * simt::kWarp * (8 + 4) + 2 * (kBracket + 4) + 4 * static_cast<int64_t>(room);
  return num_tiles(vocab_size) * (2 * 8 + 8 + 4 + 2 * 4) + (room > 0 ? of_cut : 0);
}

TQ_DEVICE DrawScratch cut_draw_scratch(int tiles, int room) {
  DrawScratch scratch{};
  // Wide types come first, so that all are aligned.
  unsigned char* place = simt::shared_memory();
  if (room > 0) {
    scratch.warp_units = reinterpret_cast<uint64_t*>(place);
    scratch.told = reinterpret_cast<Bracket*>(scratch.warp_units + 2 * simt::kWarp);
    place = reinterpret_cast<unsigned char*>(scratch.told + 2);
  }
  scratch.masses = reinterpret_cast<double*>(place);
  scratch.states = reinterpret_cast<SoftmaxState<float>*>(scratch.masses + 2 * tiles);
  scratch.tempered_sums = reinterpret_cast<float*>(scratch.states + tiles);
  scratch.counts = reinterpret_cast<int*>(scratch.tempered_sums + tiles);
  if (room > 0) {
    scratch.warp_counts = scratch.counts + 2 * tiles;
    scratch.num_nearby = scratch.warp_counts + 2 * simt::kWarp;
    scratch.nearby = reinterpret_cast<float*>(scratch.num_nearby + 2);
  }
  return scratch;
}

// The item at which a running mass first exceeds a target, and the mass before it. Where rounding lets none
// exceed it, the last item with any mass; without any mass, -1.
struct Place {
  int item;
  double before;
};

// The whole warp takes part; it asks lane l for items l, l + 32, ... in ascending order.
template <typename MassOf>
TQ_DEVICE Place find_place(int count, double target, const MassOf& mass_of) {
  Place last{-1, 0.0};
  double carry = 0.0;
  for (int base = 0; base < count; base += simt::kWarp) {
    const int item = base + simt::lane();
    const double mass = item < count ? mass_of(item) : 0.0;
    const double through = simt::running_sum(mass);
    const double before = carry + (simt::lane() == 0 ? 0.0 : through - mass);
    const uint32_t hits = simt::ballot(mass > 0.0 && carry + through > target);
    const uint32_t filled = simt::ballot(mass > 0.0);
    if (filled != 0) {
      const int from = hits != 0 ? simt::lowest_bit(hits) : simt::highest_bit(filled);
      last = {base + from, simt::shuffle(before, from)};
      if (hits != 0) return last;
    }
    carry += simt::shuffle(through, simt::kWarp - 1);
  }
  return last;
}

// The sum that find_place reaches, by the same steps.
template <typename MassOf>
TQ_DEVICE double total_of(int count, const MassOf& mass_of) {
  double carry = 0.0;
  for (int base = 0; base < count; base += simt::kWarp) {
    const int item = base + simt::lane();
    carry += simt::shuffle(simt::running_sum(item < count ? mass_of(item) : 0.0), simt::kWarp - 1);
  }
  return carry;
}

// The id inside a tile at which the running amount exceeds `target`; the whole warp takes part.
// `amount_of(x, id)` must be 0 past the end of the row, where x is -inf.
template <typename Type, typename AmountOf>
TQ_DEVICE int find_in_tile(const LogitRow<Type>& row, int tile, double target, const AmountOf& amount_of) {
  constexpr int kCount = kPerLoad<Type>;
  const auto part_mass = [&](int part) {
    float values[kCount];
    load_part(row, tile, part / simt::kWarp, part % simt::kWarp, values);
    double mass = 0.0;
    TQ_UNROLL
    for (int i = 0; i < kCount; ++i) {
      mass += amount_of(values[i], id_in_tile<Type>(tile, part / simt::kWarp, part % simt::kWarp, i));
    }
    return mass;
  };
  const Place place = find_place(kLoads<Type> * simt::kWarp, target, part_mass);
  const int part = place.item < 0 ? 0 : place.item;
  float values[kCount];
  load_part(row, tile, part / simt::kWarp, part % simt::kWarp, values);
  double running = place.before;
  int chosen = tile * kTile;
  for (int i = 0; i < kCount; ++i) {
    const int id = id_in_tile<Type>(tile, part / simt::kWarp, part % simt::kWarp, i);
    const double amount = amount_of(values[i], id);
    if (amount > 0.0) chosen = id;
    running += amount;
    if (running > target) break;
  }
  return chosen;
}

// Passes over a row by the whole group, which all its threads call together; the same on every thread.
template <typename Type>
struct RowPasses {
  LogitRow<Type> row;
  DrawScratch scratch;
  int tiles;
  int room;         // for nearby elements; 0: none are kept
  int round;        // of masses and counts
  int collections;  // so far; the last bit is the round of num_nearby. At 0, `nearby` holds the marks.
  int tellings;     // so far; the last bit is the round of told
  // All elements whose ordered bits are in [nearby_low, nearby_high) are in `nearby`.
  uint32_t nearby_low;
  uint32_t nearby_high;
};

// Whether an element of a tile can reach `least`. The states must be there.
template <typename Type>
TQ_DEVICE bool may_reach(const RowPasses<Type>& passes, int tile, float least) {
  return simt::of_leader(passes.scratch.states)[tile].peak >= least;
}

// The amount of a lane's part of a tile that `weigh` keeps, and how many of these elements are below `end`.
template <typename Type>
TQ_DEVICE Amount weigh_lane(const RowPasses<Type>& passes, const Weigh& weigh, int tile, float end, int* before_end) {
  float mass = 0.0f;
  int count = 0;
  *before_end = 0;
  for (int j = 0; j < kLoads<Type>; ++j) {
    float values[kPerLoad<Type>];
    load_part(passes.row, tile, j, simt::lane(), values);
    float mass_of_part = 0.0f;
    TQ_UNROLL
    for (int i = 0; i < kPerLoad<Type>; ++i) {
      const int id = id_in_tile<Type>(tile, j, simt::lane(), i);
      if (id < passes.row.size && Weigh::keeps(weigh, values[i], id)) {
        mass_of_part += simt::exp_fast((values[i] - weigh.peak) * weigh.inverse_temperature);
        ++count;
        *before_end += values[i] < end;
      }
    }
    mass += mass_of_part;
  }
  return {static_cast<double>(mass), count};
}

// Appends what `weigh` keeps of a tile below `end` to the nearby elements, as far as they have room, in any order.
template <typename Type>
TQ_DEVICE void collect_tile(const RowPasses<Type>& passes, const Weigh& weigh, int tile, float end, int count) {
  const int through = simt::running_sum(count);
  const int total = simt::shuffle(through, simt::kWarp - 1);
  if (total == 0) return;
  int* const num_nearby = simt::of_leader(passes.scratch.num_nearby) + passes.collections % 2;
  const int first = simt::shuffle(simt::lane() == 0 ? simt::add_to_shared(num_nearby, total) : 0, 0);
  if (first >= passes.room || count == 0) return;
  float* const nearby = simt::of_leader(passes.scratch.nearby);
  int slot = first + through - count;
  for (int j = 0; j < kLoads<Type>; ++j) {
    float values[kPerLoad<Type>];
    load_part(passes.row, tile, j, simt::lane(), values);
    TQ_UNROLL
    for (int i = 0; i < kPerLoad<Type>; ++i) {
      const int id = id_in_tile<Type>(tile, j, simt::lane(), i);
      if (id < passes.row.size && Weigh::keeps(weigh, values[i], id) && values[i] < end) {
        if (slot < passes.room) nearby[slot] = values[i];
        ++slot;
      }
    }
  }
}

// Returns the mass and the number of the elements that `weigh` keeps, to every thread; those of each tile
// are left in the leader's tables. Where `collects`, those below `end` become the nearby elements.
template <typename Type>
TQ_DEVICE Amount weigh_row(RowPasses<Type>& passes, const Weigh& weigh, float end, bool collects) {
  passes.round ^= 1;
  double* const masses = simt::of_leader(passes.scratch.masses) + passes.round * passes.tiles;
  int* const counts = simt::of_leader(passes.scratch.counts) + passes.round * passes.tiles;
  if (collects) {
    ++passes.collections;
    if (simt::group_rank() == 0 && simt::thread() == 0) passes.scratch.num_nearby[(passes.collections + 1) % 2] = 0;
  }
  for (int tile = simt::warp_of_group(); tile < passes.tiles; tile += simt::warps_of_group()) {
    Amount amount{0.0, 0};
    if (may_reach(passes, tile, weigh.least)) {
      int before_end;
      const Amount of_lane = weigh_lane(passes, weigh, tile, end, &before_end);
      amount = {simt::warp_sum(of_lane.mass), simt::warp_sum(of_lane.count)};
      if (collects) collect_tile(passes, weigh, tile, end, before_end);
    }
    if (simt::lane() == 0) {
      masses[tile] = amount.mass;
      counts[tile] = amount.count;
    }
  }
  simt::sync_group();
  Amount total{0.0, 0};
  for (int tile = simt::lane(); tile < passes.tiles; tile += simt::kWarp) {
    total.mass += masses[tile];
    total.count += counts[tile];
  }
  return {simt::warp_sum(total.mass), simt::warp_sum(total.count)};
}

// The mass of a whole tile at the temperature, relative to the peak of the row, from the first pass.
TQ_DEVICE double mass_of_tile(const SoftmaxState<float>& state, float tempered_sum, const Weigh& weigh) {
  if (state.peak == -INFINITY) return 0.0;
  return tempered_sum *
         ::exp((static_cast<double>(state.peak) - weigh.peak) * static_cast<double>(weigh.inverse_temperature));
}

}  // namespace tq
