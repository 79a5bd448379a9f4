// One token of a row: what sample_tokens and advance_rollouts_ share on CUDA.
//
// Inverse CDF in token-id order by one uniform a row, in two steps: to the tile, then inside it. What
// top-k and top-p keep is found before (cuda/truncate_row.h).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/philox.h"
#include "cuda/truncate_row.h"

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

TQ_DEVICE bool cuts(const DrawParameters& parameters, int vocab_size) {
  return parameters.temperature != 0.0f &&
         ((parameters.top_k > 0 && parameters.top_k < vocab_size) || parameters.top_p < 1.0);
}

// Makes the first pass: the state of every tile, its sum at a temperature other than 1, and the marks.
template <typename Type>
TQ_DEVICE void reduce_row(const RowPasses<Type>& passes, float inverse_temperature) {
  SoftmaxState<float>* const states = simt::of_leader(passes.scratch.states);
  float* const tempered_sums = simt::of_leader(passes.scratch.tempered_sums);
  for (int tile = simt::warp_of_group(); tile < passes.tiles; tile += simt::warps_of_group()) {
    float values[kPerLane];
    load_tile(passes.row, tile, values);
    const SoftmaxState<float> state = state_of_tile(values);
    if (passes.room > 0) leave_marks(passes, tile, max_of(values));
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
  const auto mass_of = [&](int tile) -> double {
    if (is_cut) return cut_masses[tile];
    const SoftmaxState<float> state_of_tile = scratch.states[tile];
    if (is_greedy) return state_of_tile.peak == weigh.peak ? 1.0 : 0.0;
    return mass_of_tile(state_of_tile, scratch.tempered_sums[tile], weigh);
  };
  const double total = is_greedy ? 1.0 : total_of(passes.tiles, mass_of);
  const double target = is_greedy ? 0.0 : uniform * total;
  const Place place = find_place(passes.tiles, target, mass_of);
  const int size = passes.row.size;
  const int id = find_in_tile(passes.row, place.item < 0 ? 0 : place.item, target - place.before, [&](float x, int at) {
    return at < size ? static_cast<double>(Weigh::mass(weigh, x, at)) : 0.0;
  });
  const double shifted = static_cast<double>(element_of(passes.row, id)) - state.peak;
  const float logprob = static_cast<float>(shifted - ::log(state.sum));
  if (is_greedy) return {id, logprob, 0.0f, true};
  const float proposal = static_cast<float>(shifted / temperature - ::log(total));
  return {id, logprob, ::fminf(proposal, 0.0f), true};
}

// Draws for one row with the whole group; one thread calls `finish(DrawnToken)` once. Where kMayCut is
// false the code that cuts off is left out, because it costs registers that the rest wants. `room` is that of
// the nearby elements, which only speed depends on: 0 without a cut. `parameters()` and `uniform()` are asked
// for where they are used, so that no register holds them during the first pass, which wants all.
template <typename Type, bool kMayCut, typename Parameters, typename Uniform, typename Finish>
TQ_DEVICE void draw_row(
    const LogitRow<Type>& row, const Parameters& parameters, const Uniform& uniform, int room, const Finish& finish) {
  const int tiles = static_cast<int>(num_tiles(row.size));
  const float temperature = parameters().temperature;
  const bool is_greedy = temperature == 0.0f;
  // The inverse of a very low temperature overflows; the largest float in its place still gives every
  // element but ties of the largest a mass of 0.
  const float inverse_temperature = is_greedy ? 1.0f : ::fminf(1.0f / temperature, FLT_MAX);
  RowPasses<Type> passes{row, cut_draw_scratch(tiles, room), tiles, room, 0, 0, 0, 0, 0};
  if (room > 0 && simt::group_rank() == 0 && simt::thread() < 2) passes.scratch.num_nearby[simt::thread()] = 0;
  // Wait until the leader runs: its shared memory must exist before others write to it.
  simt::sync_group();
  reduce_row(passes, inverse_temperature);
  if (!kMayCut && simt::group_rank() != 0) return;

  const SoftmaxState<double> state = merge_tiles(simt::of_leader(passes.scratch.states), tiles);
  const float peak = static_cast<float>(state.peak);
  const bool is_valid = state.sum > 0.0 && peak < INFINITY;
  Weigh weigh{peak, inverse_temperature, is_greedy ? peak : -INFINITY, INT32_MAX};
  if constexpr (kMayCut) {
    if (is_valid && cuts(parameters(), row.size)) truncate(passes, weigh, parameters().top_k, parameters().top_p);
    // Up to here all blocks read the leader's shared memory; from here on the leader alone does.
    simt::sync_group();
  }
  if (simt::group_rank() != 0 || simt::thread() >= simt::kWarp) return;
  DrawnToken token{0, -INFINITY, -INFINITY, false};
  if (is_valid) {
    const bool is_cut = kMayCut && cuts(parameters(), row.size);
    token = draw(passes, weigh, state, parameters().temperature, is_cut, uniform());
  }
  if (simt::lane() == 0) finish(token);
}

}  // namespace tq
