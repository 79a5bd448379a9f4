// One token of one row: what sample_tokens and advance_rollouts_ share.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/row_types.h"

namespace tq {

struct SamplerParameters {
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

// What the draw needs of the whole row. Blocks may be reduced by several threads, in any order.
class RowSampler {
 public:
  // Whether the blocks of a row can be reduced apart from each other: not when something is cut off.
  static bool can_split(const SamplerParameters& parameters, int64_t vocab_size);

  void start(const LogitsRow& row, const SamplerParameters& parameters);
  void reduce(int64_t block_begin, int64_t block_end);
  DrawnToken draw(double uniform);

 private:
  struct Candidate {
    uint64_t key;
    double mass;
  };

  double mass_of_block(size_t b) const;
  double total_mass() const;
  int64_t draw_whole(double uniform, double* total) const;
  int64_t draw_cut(double uniform, double* total);
  int64_t draw_among(std::vector<Candidate>& kept, double uniform, double* total) const;
  int64_t draw_flat_top_p(double wanted, double uniform, double* total) const;
  void keep_top_p(std::vector<Candidate>& candidates, double wanted) const;
  std::vector<Candidate> queued_candidates();
  double mass_of(float value) const;

  LogitsRow row_;
  SamplerParameters parameters_;
  float inverse_temperature_;
  float peak_;
  std::vector<SoftmaxState<float>> states_;
  std::vector<float> tempered_sums_;
  std::vector<uint64_t> strands_;
  TopKQueue queue_;
};

}  // namespace tq
