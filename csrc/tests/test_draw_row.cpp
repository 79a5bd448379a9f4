// The CUDA kernel of sample_tokens and advance_rollouts_, run on the CPU (tests/simt_on_host.h).
#include "cuda/draw_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

tq::DrawnToken run(
    const std::vector<float>& logits, const tq::DrawParameters& parameters, double uniform, int blocks, int threads,
    int room) {
  const int size = static_cast<int>(logits.size());
  tq::DrawnToken token{-7, NAN, NAN, false};
  int calls = 0;
  tq::simt::launch_on_host(1, blocks, threads, tq::draw_shared_bytes(size, room), [&] {
    const auto row = tq::LogitRow<tq::Float32>::at(logits.data(), 0, size, size, 1.0f);
    const auto take = [&](const tq::DrawnToken& drawn) {
      token = drawn;
      ++calls;
    };
    tq::draw_row<tq::Float32, true>(row, [&] { return parameters; }, [&] { return uniform; }, room, take);
  });
  CHECK(calls == 1);
  return token;
}

void check_same(const tq::DrawnToken& one, const tq::DrawnToken& other) {
  CHECK(one.id == other.id && one.is_valid == other.is_valid);
  CHECK(std::memcmp(&one.logprob, &other.logprob, 4) == 0);
  CHECK(std::memcmp(&one.proposal_logprob, &other.proposal_logprob, 4) == 0);
}

// The size of a group and of its blocks changes nothing, to the last bit, nor does the room for nearby
// elements.
tq::DrawnToken draw(const std::vector<float>& logits, const tq::DrawParameters& parameters, double uniform) {
  const tq::DrawnToken one = run(logits, parameters, uniform, 1, 64, tq::kNearbyRoom);
  check_same(one, run(logits, parameters, uniform, 3, 32, tq::kNearbyRoom));
  check_same(one, run(logits, parameters, uniform, 2, 32, 100));
  check_same(one, run(logits, parameters, uniform, 1, 64, 0));
  return one;
}

// Computes the masses that truncation leaves, in the plainest way.
std::vector<double> kept_masses(const std::vector<float>& logits, const tq::DrawParameters& parameters) {
  const size_t size = logits.size();
  std::vector<float> x(size);
  for (size_t i = 0; i < size; ++i) x[i] = std::isnan(logits[i]) ? -INFINITY : logits[i];
  const double peak = *std::max_element(x.begin(), x.end());
  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
  std::vector<double> masses(size);
  for (size_t i = 0; i < size; ++i) masses[i] = std::exp((x[i] - peak) / parameters.temperature);
  const size_t first = parameters.top_k > 0 ? std::min<size_t>(parameters.top_k, size) : size;
  double total = 0.0;
  for (size_t i = 0; i < first; ++i) total += masses[order[i]];
  double before = 0.0;
  std::vector<double> kept(size, 0.0);
  for (size_t i = 0; i < first && (i == 0 || before < parameters.top_p * total); ++i) {
    kept[order[i]] = masses[order[i]];
    before += masses[order[i]];
  }
  return kept;
}

void check(const std::vector<float>& logits, const tq::DrawParameters& parameters) {
  const std::vector<double> kept = kept_masses(logits, parameters);
  const double total = std::accumulate(kept.begin(), kept.end(), 0.0);
  double peak = -INFINITY;
  for (const float x : logits) peak = x > peak ? x : peak;
  double mass_of_model = 0.0;
  for (const float x : logits) mass_of_model += std::isnan(x) ? 0.0 : std::exp(x - peak);
  for (const double uniform : {0.0001, 0.5, 0.99999}) {
    const tq::DrawnToken token = draw(logits, parameters, uniform);
    CHECK(token.is_valid);
    CHECK(token.id >= 0 && token.id < static_cast<int64_t>(logits.size()));
    CHECK(kept[token.id] > 0.0);
    const double through = std::accumulate(kept.begin(), kept.begin() + token.id + 1, 0.0);
    CHECK(through > (uniform - 2e-6) * total);
    CHECK(through - kept[token.id] <= (uniform + 2e-6) * total);
    CHECK_CLOSE(token.logprob, logits[token.id] - peak - std::log(mass_of_model), 1e-5);
    CHECK_CLOSE(token.proposal_logprob, std::log(kept[token.id] / total), 1e-5);
  }
}

std::vector<float> random_logits(int count, float spread) {
  std::mt19937 engine(count);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(count);
  for (float& x : logits) x = normal(engine);
  return logits;
}

void the_whole_law() {
  for (const int size : {1, 2, 31, 2049, 5001}) {
    check(random_logits(size, 2.0f), {1.0f, 0, 1.0});
    check(random_logits(size, 2.0f), {1.7f, 0, 1.0});
    check(random_logits(size, 40.0f), {0.3f, 0, 1.0});
  }
}

void truncated_laws() {
  for (const int size : {5, 1000, 5001}) {
    const std::vector<float> logits = random_logits(size, 1.5f);
    for (const tq::DrawParameters& parameters :
         {tq::DrawParameters{1.0f, 3, 1.0},
          {1.0f, 700, 1.0},
          {0.8f, 0, 0.9},
          {2.0f, 0, 0.999},
          {1.0f, 40, 0.6},
          {1.3f, 1, 1.0},
          {1.0f, 0, 0.0}}) {
      check(logits, parameters);
    }
  }
}

void ties_at_the_edge_go_to_the_lower_ids() {
  std::vector<float> logits(4500);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 3);
  check(std::vector<float>(4500, 1.0f), {1.0f, 3000, 1.0});
  check(std::vector<float>(4500, 1.0f), {1.0f, 0, 0.7});
  check(logits, {1.0f, 2000, 1.0});
  check(logits, {1.0f, 0, 0.3});
  check(logits, {1.0f, 2000, 0.8});
  check(logits, {1.0f, 1000, 0.5});
  // Top-k keeps one of the ties, and top-p all that it left.
  std::vector<float> flat(4500, 0.0f);
  flat[700] = flat[4000] = 1.0f;
  check(flat, {1.0f, 3, 0.9});
}

void nan_is_never_drawn() {
  std::vector<float> logits = random_logits(3000, 2.0f);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = i % 3 == 0 ? NAN : i % 3 == 1 ? -INFINITY : logits[i];
  check(logits, {1.0f, 0, 1.0});
  check(logits, {1.0f, 2000, 1.0});
  check(logits, {1.0f, 0, 0.99});
}

void temperature_zero_is_the_first_arg_max() {
  std::vector<float> logits = random_logits(6000, 1.0f);
  logits[2500] = logits[2501] = logits[5999] = 50.0f;
  const tq::DrawnToken token = draw(logits, {0.0f, 5, 0.5}, 0.9);
  CHECK(token.id == 2500 && token.is_valid);
  CHECK(token.proposal_logprob == 0.0f);
}

void rows_without_a_law_are_invalid() {
  std::vector<float> logits = random_logits(3000, 1.0f);
  logits[2999] = INFINITY;
  for (const tq::DrawParameters& parameters : {tq::DrawParameters{1.0f, 0, 1.0}, {0.0f, 0, 1.0}, {1.0f, 4, 0.5}}) {
    for (const std::vector<float>& row : {logits, std::vector<float>(3000, NAN)}) {
      const tq::DrawnToken token = draw(row, parameters, 0.5);
      CHECK(!token.is_valid && token.id == 0);
      CHECK(token.logprob == -INFINITY && token.proposal_logprob == -INFINITY);
    }
  }
}

// Passes over a row of whole tiles, counted by the 16-byte loads that they take.
double count_passes(const std::vector<float>& logits, const tq::DrawParameters& parameters, int room) {
  tq::simt::num_quads_loaded() = 0;
  run(logits, parameters, 0.5, 2, 64, room);
  return static_cast<double>(tq::simt::num_quads_loaded()) * 4 / static_cast<double>(logits.size());
}

// Passes of bisection alone, before the elements near the peak were brought together: 17 to 39 for these
// rows.
void few_passes_find_what_is_kept() {
  const std::vector<float> bulk = random_logits(64 * 2048, 1.5f);
  // A model's row: a bulk, and some tokens far above it that have most of the mass.
  std::vector<float> peaked = bulk;
  for (int i = 0; i < 40; ++i) peaked[1000 + 1531 * i] = 14.0f - 0.2f * static_cast<float>(i);
  for (const std::vector<float>& row : {bulk, peaked}) {
    for (const tq::DrawParameters& parameters :
         {tq::DrawParameters{1.0f, 50, 1.0}, {0.7f, 50, 0.9}, {1.3f, 200, 0.95}}) {
      CHECK(count_passes(row, parameters, tq::kNearbyRoom) < 3.2);
    }
  }
  CHECK(count_passes(peaked, {1.0f, 0, 0.9}, tq::kNearbyRoom) < 1.5);
  CHECK(count_passes(peaked, {1.0f, 0, 0.95}, tq::kNearbyRoom) < 3.5);
  // Half of the vocabulary is kept, and more than there is room for lies close together.
  CHECK(count_passes(bulk, {1.0f, 0, 0.95}, tq::kNearbyRoom) < 15.0);
}

void more_than_there_is_room_for_is_narrowed_by_passes() {
  const std::vector<float> logits = random_logits(9000, 0.5f);
  for (const tq::DrawParameters& parameters :
       {tq::DrawParameters{1.0f, 0, 0.9}, {1.0f, 4500, 1.0}, {1.0f, 6000, 0.7}, {1.0f, 0, 0.9999999999}}) {
    check(logits, parameters);
  }
  // The largest lies so far above that halving the range of values comes to nothing.
  std::vector<float> far = logits;
  far[77] = 1e30f;
  check(far, {1.0f, 7000, 1.0});
}

}  // namespace

int main() {
  the_whole_law();
  truncated_laws();
  ties_at_the_edge_go_to_the_lower_ids();
  nan_is_never_drawn();
  temperature_zero_is_the_first_arg_max();
  rows_without_a_law_are_invalid();
  few_passes_find_what_is_kept();
  more_than_there_is_room_for_is_narrowed_by_passes();
  return tq_test::num_failures();
}
