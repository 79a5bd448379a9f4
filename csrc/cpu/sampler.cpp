#include "cpu/sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>

#include "common/ordered_key.h"
#include "cpu/softmax_rows.h"

namespace tq {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// How many of the most likely tokens a top-p cut looks at before it sorts the vocabulary.
constexpr int64_t kTopPQueue = 512;

bool cuts_count(const SamplerParameters& parameters, int64_t vocab_size) {
  return parameters.top_k > 0 && parameters.top_k < vocab_size;
}

bool cuts_mass(const SamplerParameters& parameters) { return parameters.top_p < 1.0; }

}  // namespace

bool RowSampler::can_split(const SamplerParameters& parameters, int64_t vocab_size) {
  return parameters.temperature == 0.0f || !(cuts_count(parameters, vocab_size) || cuts_mass(parameters));
}

void RowSampler::start(const LogitsRow& row, const SamplerParameters& parameters) {
  row_ = row;
  parameters_ = parameters;
  // A temperature so low that its inverse overflows: the largest float still makes 0 of all but ties.
  inverse_temperature_ = parameters.temperature == 0.0f ? 1.0f : std::min(1.0f / parameters.temperature, FLT_MAX);
  states_.resize(num_blocks(row.size));
  queue_.keys = nullptr;
  tempered_sums_.clear();
  if (parameters.temperature == 0.0f) return;
  const bool has_top_k = cuts_count(parameters, row.size);
  // Top-k alone needs the masses of k tokens, which are made from their values.
  if (parameters.temperature != 1.0f && !has_top_k) tempered_sums_.resize(states_.size());
  if (can_split(parameters, row.size)) return;
  const int64_t k = has_top_k ? parameters.top_k : std::min(kTopPQueue, row.size);
  strands_.resize(queue_room(k));
  queue_ = start_queue(strands_.data(), k);
}

void RowSampler::reduce(int64_t block_begin, int64_t block_end) {
  const BlockReduction job{
      row_, 1.0f, states_.data(), tempered_sums_.empty() ? nullptr : tempered_sums_.data(), inverse_temperature_,
      queue_.keys == nullptr ? nullptr : &queue_};
  TQ_SELECT_ISA(reduce_blocks)(job, block_begin, block_end);
}

DrawnToken RowSampler::draw(double uniform) {
  const SoftmaxState<double> state = merge_blocks(states_.data(), static_cast<int64_t>(states_.size()));
  peak_ = static_cast<float>(state.peak);
  if (!(state.sum > 0.0) || peak_ == kInfinity) return {0, -kInfinity, -kInfinity, false};

  int64_t id;
  double total = 1.0;
  if (parameters_.temperature == 0.0f) {
    int64_t b = 0;
    while (states_[b].peak != peak_) ++b;
    id = TQ_SELECT_ISA(find_in_block)(row_, b, peak_);
  } else if (queue_.keys == nullptr) {
    id = draw_whole(uniform, &total);
  } else {
    id = draw_cut(uniform, &total);
  }
  const double shifted = static_cast<double>(TQ_SELECT_ISA(value_at)(row_, id)) - state.peak;
  const float logprob = static_cast<float>(shifted - std::log(state.sum));
  if (parameters_.temperature == 0.0f) return {id, logprob, 0.0f, true};
  const float proposal = static_cast<float>(shifted / parameters_.temperature - std::log(total));
  return {id, logprob, std::min(proposal, 0.0f), true};
}

double RowSampler::mass_of(float value) const {
  return std::exp((static_cast<double>(value) - peak_) * inverse_temperature_);
}

double RowSampler::mass_of_block(size_t b) const {
  if (states_[b].peak == -kInfinity) return 0.0;
  return (tempered_sums_.empty() ? states_[b].sum : tempered_sums_[b]) * mass_of(states_[b].peak);
}

double RowSampler::total_mass() const {
  double total = 0.0;
  for (size_t b = 0; b < states_.size(); ++b) total += mass_of_block(b);
  return total;
}

// Inverse CDF over everything: to the block, then inside it.
int64_t RowSampler::draw_whole(double uniform, double* total) const {
  *total = total_mass();
  const double target = uniform * *total;
  double before = 0.0;
  double before_last = 0.0;
  size_t last = 0;
  for (size_t b = 0; b < states_.size(); ++b) {
    const double mass = mass_of_block(b);
    if (mass > 0.0) {
      last = b;
      before_last = before;
      if (before + mass > target) break;
    }
    before += mass;
  }
  return TQ_SELECT_ISA(draw_in_block)(
      row_, static_cast<int64_t>(last), peak_, inverse_temperature_, target - before_last);
}

// Inverse CDF over what top-k, and then top-p, leave.
int64_t RowSampler::draw_cut(double uniform, double* total) {
  std::vector<Candidate> kept = queued_candidates();
  if (cuts_mass(parameters_)) {
    double queued = 0.0;
    for (const Candidate& candidate : kept) queued += candidate.mass;
    const bool is_all = cuts_count(parameters_, row_.size) || static_cast<int64_t>(kept.size()) == row_.size;
    const double wanted = parameters_.top_p * (is_all ? queued : total_mass());
    if (!is_all && queued < wanted) return draw_flat_top_p(wanted, uniform, total);
    keep_top_p(kept, wanted);
  }
  return draw_among(kept, uniform, total);
}

// The k largest, the most likely first.
std::vector<RowSampler::Candidate> RowSampler::queued_candidates() {
  topk_shrink(&queue_);
  std::vector<uint64_t> keys(queue_.size * kStrandLength);
  keys.resize(TQ_SELECT_ISA(gather_strands)(row_, 1.0f, queue_, keys.data()));
  const auto end = keys.begin() + std::min<int64_t>(queue_.k, keys.size());
  std::partial_sort(keys.begin(), end, keys.end(), std::greater<uint64_t>());
  std::vector<Candidate> candidates;
  for (auto key = keys.begin(); key < end; ++key) candidates.push_back({*key, mass_of(value_of_key(*key))});
  return candidates;
}

// A token stays while the mass before it falls short; the first stays whatever top_p is.
void RowSampler::keep_top_p(std::vector<Candidate>& candidates, double wanted) const {
  double before = 0.0;
  size_t count = 0;
  while (count < candidates.size() && (count == 0 || before < wanted)) before += candidates[count++].mass;
  candidates.resize(count);
}

int64_t RowSampler::draw_among(std::vector<Candidate>& kept, double uniform, double* total) const {
  std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) {
    return id_of_key(a.key) < id_of_key(b.key);
  });
  *total = 0.0;
  for (const Candidate& candidate : kept) *total += candidate.mass;
  const double target = uniform * *total;
  double running = 0.0;
  uint32_t last_with_mass = id_of_key(kept.front().key);
  for (const Candidate& candidate : kept) {
    running += candidate.mass;
    if (candidate.mass > 0.0) last_with_mass = id_of_key(candidate.key);
    if (running > target) break;
  }
  return last_with_mass;
}

// Top-p of a law so flat that the queue cannot hold what is kept. The least value that is kept is
// found by bisection over the floats, one vector pass a step, instead of sorting the vocabulary.
int64_t RowSampler::draw_flat_top_p(double wanted, double uniform, double* total) const {
  const int64_t padded = (row_.size + 15) / 16 * 16;
  std::vector<float> values(padded);
  std::vector<float> masses(padded);
  TQ_SELECT_ISA(masses_of_row)(row_, peak_, inverse_temperature_, values.data(), masses.data());
  const auto mass_from = TQ_SELECT_ISA(mass_from);
  // All values from `low` on are enough; those from `high` on, above the last that is queued, are not.
  uint32_t low = ordered_bits(-kInfinity);
  uint32_t high = ordered_bits(queue_.threshold) + 1;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const double mass = mass_from(values.data(), masses.data(), padded, value_from_ordered_bits(middle));
    (mass < wanted ? high : low) = middle;
  }
  const float least = value_from_ordered_bits(low);
  const float above = value_from_ordered_bits(high);
  const double mass_above = mass_from(values.data(), masses.data(), padded, above);
  // Of the tokens that tie at the least value, the lower ids come first.
  const double tie_mass = mass_of(least);
  const double num_ties = tie_mass > 0.0 ? std::ceil((wanted - mass_above) / tie_mass) : 0.0;
  *total = mass_above + num_ties * tie_mass;
  const double target = uniform * *total;
  double ties_left = num_ties;
  double running = 0.0;
  int64_t last_with_mass = 0;
  for (int64_t id = 0; id < row_.size && running <= target; ++id) {
    if (values[id] < least) continue;
    if (values[id] == least && ties_left-- <= 0.0) continue;
    running += masses[id];
    if (masses[id] > 0.0f) last_with_mass = id;
  }
  return last_with_mass;
}

}  // namespace tq
