#include "cpu/sampling/row_sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "common/ordered_key.h"
#include "cpu/sampling/softmax_rows.h"
#include "cpu/sampling/top_p.h"

namespace tq {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr KeptValues kEverything{-kInfinity, std::numeric_limits<int64_t>::max()};

}  // namespace

void RowSampler::start(const LogitsRow& row, const SamplerParameters& parameters) {
  row_ = row;
  parameters_ = parameters;
  const bool is_arg_max = parameters.temperature == 0.0f;
  // The inverse of a very low temperature overflows; the largest float in its place still gives every
  // element but ties of the largest a mass of 0.
  scale_ = {-kInfinity, is_arg_max ? 1.0f : std::min(1.0f / parameters.temperature, FLT_MAX)};
  const size_t blocks = num_blocks(row.size);
  states_.resize(blocks);
  strand_peaks_.resize(!is_arg_max && cuts_count() ? blocks * kGroup : 0);
  // Sums at the temperature are for the whole row only: a draw from a cut row weighs its values itself.
  tempered_sums_.resize(is_arg_max || cuts_count() || cuts_mass() || scale_.inverse_temperature == 1.0f ? 0 : blocks);
}

void RowSampler::reduce(int64_t block_begin, int64_t block_end) {
  const BlockReduction job{
      row_,
      1.0f,
      states_.data(),
      tempered_sums_.empty() ? nullptr : tempered_sums_.data(),
      scale_.inverse_temperature,
      strand_peaks_.empty() ? nullptr : strand_peaks_.data()};
  TQ_SELECT_ISA(reduce_blocks)(job, block_begin, block_end);
}

DrawnToken RowSampler::draw(double uniform) {
  const SoftmaxState<double> state = merge_blocks(states_.data(), static_cast<int64_t>(states_.size()));
  scale_.peak = static_cast<float>(state.peak);
  if (!(state.sum > 0.0) || scale_.peak == kInfinity) return {0, -kInfinity, -kInfinity, false};

  const bool is_arg_max = parameters_.temperature == 0.0f;
  double total = 1.0;
  const int64_t id = is_arg_max     ? draw_arg_max()
                     : cuts_count() ? draw_top_k(uniform, &total)
                     : cuts_mass()  ? draw_top_p(uniform, &total)
                                    : draw_whole(uniform, &total);
  const double shifted = static_cast<double>(TQ_SELECT_ISA(value_at)(row_, id)) - state.peak;
  const float logprob = std::min(static_cast<float>(shifted - std::log(state.sum)), 0.0f);
  if (is_arg_max) return {id, logprob, 0.0f, true};
  const float proposal = static_cast<float>(shifted / parameters_.temperature - std::log(total));
  return {id, logprob, std::min(proposal, 0.0f), true};
}

int64_t RowSampler::draw_arg_max() const {
  int64_t b = 0;
  while (states_[b].peak != scale_.peak) ++b;
  return TQ_SELECT_ISA(find_in_block)(row_, b, scale_.peak);
}

int64_t RowSampler::draw_whole(double uniform, double* total) {
  const size_t blocks = states_.size();
  block_masses_.resize(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    block_masses_[b] = (static_cast<double>(states_[b].peak) - scale_.peak) * scale_.inverse_temperature;
  }
  TQ_SELECT_ISA(exp_in_place)(block_masses_.data(), static_cast<int64_t>(blocks));
  for (size_t b = 0; b < blocks; ++b) {
    block_masses_[b] *= tempered_sums_.empty() ? states_[b].sum : tempered_sums_[b];
  }
  ties_before_.assign(blocks, 0);
  kept_ = kEverything;
  return draw_by_block(uniform, total);
}

int64_t RowSampler::draw_top_p(double uniform, double* total) {
  kept_ = find_top_p(row_, scale_, parameters_.top_p, room_);
  const double tie_mass = TQ_SELECT_ISA(mass_of_value)(scale_, kept_.least);
  const size_t blocks = states_.size();
  block_masses_.resize(blocks);
  ties_before_.resize(blocks);
  int64_t ties = 0;
  for (size_t b = 0; b < blocks; ++b) {
    ties_before_[b] = std::min(ties, kept_.num_ties);
    block_masses_[b] = 0.0;
    if (states_[b].peak < kept_.least) continue;
    const KeptMass mass = TQ_SELECT_ISA(kept_mass_of_block)(row_, static_cast<int64_t>(b), scale_, kept_.least);
    ties += mass.num_ties;
    block_masses_[b] = mass.above + (std::min(ties, kept_.num_ties) - ties_before_[b]) * tie_mass;
  }
  return draw_by_block(uniform, total);
}

// Finds the block that the target falls into, then the token inside it, among the values that are kept.
int64_t RowSampler::draw_by_block(double uniform, double* total) const {
  *total = 0.0;
  for (const double mass : block_masses_) *total += mass;
  const double target = uniform * *total;
  double before = 0.0;
  double before_last = 0.0;
  size_t last = 0;
  for (size_t b = 0; b < block_masses_.size(); ++b) {
    if (block_masses_[b] > 0.0) {
      last = b;
      before_last = before;
      if (before + block_masses_[b] > target) break;
    }
    before += block_masses_[b];
  }
  return TQ_SELECT_ISA(draw_in_block)(
      row_, static_cast<int64_t>(last), scale_, {kept_.least, kept_.num_ties - ties_before_[last]},
      target - before_last);
}

// Draws by inverse CDF among the tokens that top-k, and then top-p, leave.
int64_t RowSampler::draw_top_k(double uniform, double* total) {
  const int64_t k = parameters_.top_k;
  const uint64_t* const keys = topk_.find(row_, 1.0f, states_.data(), strand_peaks_.data(), k);
  candidates_.clear();
  for (int64_t i = 0; i < k; ++i) {
    const double shifted = static_cast<double>(value_of_key(keys[i])) - scale_.peak;
    candidates_.push_back({id_of_key(keys[i]), std::exp(shifted * scale_.inverse_temperature)});
  }
  if (cuts_mass()) keep_top_p();
  kept_ = {value_of_key(keys[candidates_.size() - 1]), 0};
  for (size_t i = candidates_.size(); i > 0 && value_of_key(keys[i - 1]) == kept_.least; --i) ++kept_.num_ties;
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  *total = 0.0;
  for (const Candidate& candidate : candidates_) *total += candidate.mass;
  const double target = uniform * *total;
  double running = 0.0;
  uint32_t last_with_mass = candidates_.front().id;
  for (const Candidate& candidate : candidates_) {
    running += candidate.mass;
    if (candidate.mass > 0.0) last_with_mass = candidate.id;
    if (running > target) break;
  }
  return last_with_mass;
}

// Keeps a token while the mass before it falls short of the share; the first one always.
void RowSampler::keep_top_p() {
  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.mass;
  const double wanted = parameters_.top_p * total;
  double before = 0.0;
  size_t count = 0;
  while (count < candidates_.size() && (count == 0 || before < wanted)) before += candidates_[count++].mass;
  candidates_.resize(count);
}

}  // namespace tq
