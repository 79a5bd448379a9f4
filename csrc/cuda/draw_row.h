// One token of a row: what sample_tokens and advance_rollouts_ share on CUDA.
//
// Inverse CDF in token-id order by one uniform a row, in two steps: to the tile, then inside it.
// Top-k and top-p are a least value that is kept, found by bisection over the bits of floats, one
// pass over the row a step (it then lies in the cache), and among equals the last id that is kept.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/ordered_key.h"
#include "common/philox.h"
#include "cuda/tile.h"

namespace tq {

struct DrawParameters {
  float temperature;  // 0: arg max
  int64_t top_k;      // 0: all
  double top_p;
};

struct DrawnToken {
  int64_t id;
  float logprob;           // of the model itself: temperature 1, nothing cut off
  float proposal_logprob;  // of the density that was drawn from
  bool is_valid;           // false for a row without any finite logit, or with +inf
};

// The mass of an element: exp((x - peak) / temperature), 0 for what is cut off.
struct Weigh {
  float peak;
  float inverse_temperature;
  float least;       // what lies below is cut off,
  int last_tie;      // and so are elements equal to `least` with a later id than this
  TQ_DEVICE bool keeps(const Weigh& weigh, float x, int id) {
    return x > weigh.least || (x == weigh.least && id <= weigh.last_tie);
  }
  TQ_DEVICE float mass(const Weigh& weigh, float x, int id) {
    return keeps(weigh, x, id) ? simt::exp_fast((x - weigh.peak) * weigh.inverse_temperature) : 0.0f;
  }
};

// Shared memory of a block; only the leader's is used. There are two rounds of masses and counts, so that
// one barrier a pass is enough.
struct DrawScratch {
  double* masses;  // [2 * tiles]
  SoftmaxState<float>* states;
  float* tempered_sums;  // sums of exp((x - peak of tile) / temperature)
  int* counts;           // [2 * tiles]
};

TQ_HOST_DEVICE int64_t draw_shared_bytes(int64_t vocab_size) {
  return num_tiles(vocab_size) * (2 * 8 + 8 + 4 + 2 * 4);
}

TQ_DEVICE DrawScratch cut_draw_scratch(int tiles) {
  DrawScratch scratch;
  scratch.masses = reinterpret_cast<double*>(simt::shared_memory());
  scratch.states = reinterpret_cast<SoftmaxState<float>*>(scratch.masses + 2 * tiles);
  scratch.tempered_sums = reinterpret_cast<float*>(scratch.states + tiles);
  scratch.counts = reinterpret_cast<int*>(scratch.tempered_sums + tiles);
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
TQ_DEVICE int find_in_tile(
    const LogitRow<Type>& row, int tile, double target, const AmountOf& amount_of) {
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

struct Amount {
  double mass;
  int count;
};

// Passes over a row by the whole group, which all its threads call together.
template <typename Type>
struct RowPasses {
  LogitRow<Type> row;
  DrawScratch scratch;
  int tiles;
  int round;
};

// Returns the mass and the number of the elements that `weigh` keeps, to every thread; those of each tile
// are left in the leader's tables.
template <typename Type>
TQ_DEVICE Amount weigh_row(RowPasses<Type>& passes, const Weigh& weigh) {
  passes.round ^= 1;
  double* const masses = simt::of_leader(passes.scratch.masses) + passes.round * passes.tiles;
  int* const counts = simt::of_leader(passes.scratch.counts) + passes.round * passes.tiles;
  for (int tile = simt::warp_of_group(); tile < passes.tiles; tile += simt::warps_of_group()) {
    float mass_of_lane = 0.0f;
    int count = 0;
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
        }
      }
      mass_of_lane += mass_of_part;
    }
    const double mass = simt::warp_sum(static_cast<double>(mass_of_lane));
    count = simt::warp_sum(count);
    if (simt::lane() == 0) {
      masses[tile] = mass;
      counts[tile] = count;
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

// The id of the `wanted`-th element (from 1) that equals `least`.
template <typename Type>
TQ_DEVICE int find_tie(RowPasses<Type>& passes, float least, int wanted) {
  passes.round ^= 1;
  int* const counts = simt::of_leader(passes.scratch.counts) + passes.round * passes.tiles;
  for (int tile = simt::warp_of_group(); tile < passes.tiles; tile += simt::warps_of_group()) {
    int count = 0;
    for (int j = 0; j < kLoads<Type>; ++j) {
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

// Narrows `weigh` to the largest least value whose kept amount reaches `wanted`: by mass, or by count.
template <typename Type>
TQ_DEVICE void cut(RowPasses<Type>& passes, Weigh& weigh, Amount kept, double wanted, bool is_by_mass) {
  const Weigh whole = weigh;
  uint32_t low = ordered_bits(whole.least);
  uint32_t high = ordered_bits(whole.peak) + 1;
  Amount above{0.0, 0};
  int count = kept.count;
  const auto is_found = [&] {
    return count - above.count <= 1 || (!is_by_mass && static_cast<double>(count) == wanted);
  };
  while (high - low > 1 && !is_found()) {
    const uint32_t middle = low + (high - low) / 2;
    Weigh tried = whole;
    tried.least = value_from_ordered_bits(middle);
    tried.last_tie = INT32_MAX;
    const Amount amount = weigh_row(passes, tried);
    if ((is_by_mass ? amount.mass : static_cast<double>(amount.count)) >= wanted) {
      low = middle;
      count = amount.count;
    } else {
      high = middle;
      above = amount;
    }
  }
  const float least = value_from_ordered_bits(low);
  const bool is_narrower = least > whole.least;
  weigh.least = least;
  weigh.last_tie = is_narrower ? INT32_MAX : whole.last_tie;
  if (is_found()) return;
  // All of [low, high) are equal: the lower ids come first.
  double ties = wanted - static_cast<double>(above.count);
  if (is_by_mass) {
    const double mass_of_tie = static_cast<double>(simt::exp_fast((least - whole.peak) * whole.inverse_temperature));
    ties = mass_of_tie > 0.0 ? ::ceil((wanted - above.mass) / mass_of_tie) : 1.0;
  }
  const int most = count - above.count;
  const int num_ties = ties < 1.0 ? 1 : ties < static_cast<double>(most) ? static_cast<int>(ties) : most;
  weigh.last_tie = find_tie(passes, least, num_ties);
}

// Cuts by top-k first, then by top-p of what is left. The whole group calls it.
template <typename Type>
TQ_DEVICE void truncate(RowPasses<Type>& passes, Weigh& weigh, const DrawParameters& parameters) {
  Amount kept = weigh_row(passes, weigh);
  if (parameters.top_k > 0 && parameters.top_k < kept.count) {
    cut(passes, weigh, kept, static_cast<double>(parameters.top_k), false);
    kept = weigh_row(passes, weigh);
  }
  if (parameters.top_p < 1.0) {
    cut(passes, weigh, kept, parameters.top_p * kept.mass, true);
    weigh_row(passes, weigh);
  }
}

TQ_DEVICE bool cuts(const DrawParameters& parameters, int vocab_size) {
  return parameters.temperature != 0.0f &&
         ((parameters.top_k > 0 && parameters.top_k < vocab_size) || parameters.top_p < 1.0);
}

// Makes the first pass: the state of every tile, and its sum at a temperature other than 1.
template <typename Type>
TQ_DEVICE void reduce_row(const RowPasses<Type>& passes, float inverse_temperature) {
  SoftmaxState<float>* const states = simt::of_leader(passes.scratch.states);
  float* const tempered_sums = simt::of_leader(passes.scratch.tempered_sums);
  for (int tile = simt::warp_of_group(); tile < passes.tiles; tile += simt::warps_of_group()) {
    float values[kPerLane];
    load_tile(passes.row, tile, values);
    const SoftmaxState<float> state = state_of_tile(values);
    float tempered = state.sum;
    if (inverse_temperature != 1.0f && state.peak != -INFINITY) {
      tempered = simt::warp_sum(sum_of_exps(values, state.peak, inverse_temperature));
    }
    if (simt::lane() == 0) {
      states[tile] = state;
      tempered_sums[tile] = tempered;
    }
  }
  simt::sync_group();
}

// Draws a token, by one warp of the leader.
template <typename Type>
TQ_DEVICE DrawnToken draw(
    const RowPasses<Type>& passes, const Weigh& weigh, SoftmaxState<double> state, float temperature, bool is_cut,
    double uniform) {
  const DrawScratch& scratch = passes.scratch;
  const bool is_greedy = temperature == 0.0f;
  const double* const cut_masses = scratch.masses + passes.round * passes.tiles;
  const auto mass_of_tile = [&](int tile) -> double {
    if (is_cut) return cut_masses[tile];
    const float peak = scratch.states[tile].peak;
    if (peak == -INFINITY) return 0.0;
    if (is_greedy) return peak == weigh.peak ? 1.0 : 0.0;
    return scratch.tempered_sums[tile] *
           ::exp((static_cast<double>(peak) - weigh.peak) * static_cast<double>(weigh.inverse_temperature));
  };
  const double total = is_greedy ? 1.0 : total_of(passes.tiles, mass_of_tile);
  const double target = is_greedy ? 0.0 : uniform * total;
  const Place place = find_place(passes.tiles, target, mass_of_tile);
  const int size = passes.row.size;
  const int id =
      find_in_tile(passes.row, place.item < 0 ? 0 : place.item, target - place.before, [&](float x, int at) {
        return at < size ? static_cast<double>(Weigh::mass(weigh, x, at)) : 0.0;
      });
  const double shifted = static_cast<double>(element_of(passes.row, id)) - state.peak;
  const float logprob = static_cast<float>(shifted - ::log(state.sum));
  if (is_greedy) return {id, logprob, 0.0f, true};
  const float proposal = static_cast<float>(shifted / temperature - ::log(total));
  return {id, logprob, ::fminf(proposal, 0.0f), true};
}

// Draws for one row with the whole group; one thread calls `finish(DrawnToken)` once. Where kMayCut is
// false the code that cuts off is left out, because it costs registers that the rest wants.
template <typename Type, bool kMayCut, typename Finish>
TQ_DEVICE void draw_row(
    const LogitRow<Type>& row, const DrawParameters& parameters, double uniform, const Finish& finish) {
  const int tiles = static_cast<int>(num_tiles(row.size));
  RowPasses<Type> passes{row, cut_draw_scratch(tiles), tiles, 0};
  const bool is_greedy = parameters.temperature == 0.0f;
  // The inverse of a very low temperature overflows; the largest float in its place still gives every
  // element but ties of the largest a mass of 0.
  const float inverse_temperature = is_greedy ? 1.0f : ::fminf(1.0f / parameters.temperature, FLT_MAX);
  // Wait until the leader runs: its shared memory must exist before others write to it.
  simt::sync_group();
  reduce_row(passes, inverse_temperature);
  const bool may_cut = kMayCut && cuts(parameters, row.size);
  if (!may_cut && simt::group_rank() != 0) return;

  const SoftmaxState<double> state = merge_tiles(simt::of_leader(passes.scratch.states), tiles);
  const float peak = static_cast<float>(state.peak);
  const bool is_valid = state.sum > 0.0 && peak < INFINITY;
  Weigh weigh{peak, inverse_temperature, is_greedy ? peak : -INFINITY, INT32_MAX};
  const bool is_cut = is_valid && may_cut;
  if constexpr (kMayCut) {
    if (is_cut) truncate(passes, weigh, parameters);
  }
  // Up to here all blocks read the leader's shared memory; from here on the leader alone does.
  if (may_cut) simt::sync_group();
  if (simt::group_rank() != 0 || simt::thread() >= simt::kWarp) return;
  DrawnToken token{0, -INFINITY, -INFINITY, false};
  if (is_valid) token = draw(passes, weigh, state, parameters.temperature, is_cut, uniform);
  if (simt::lane() == 0) finish(token);
}

}  // namespace tq
