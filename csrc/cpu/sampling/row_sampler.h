// One token of one row: what sample_tokens and advance_rollouts_ share.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/sampling/logits_row.h"
#include "cpu/sampling/token_mass_rows.h"
#include "cpu/sampling/topk.h"

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

// Gathers what a draw needs of the whole row. Several threads may reduce its blocks, in any order.
class RowSampler {
 public:
  void start(const LogitsRow& row, const SamplerParameters& parameters);
  void reduce(int64_t block_begin, int64_t block_end);
  DrawnToken draw(double uniform);
  // The values that the last draw was made from, unless that was an arg max.
  const KeptValues& kept() const { return kept_; }

 private:
  struct Candidate {
    uint32_t id;
    double mass;
  };

  bool cuts_count() const { return parameters_.top_k > 0 && parameters_.top_k < row_.size; }
  bool cuts_mass() const { return parameters_.top_p < 1.0; }
  int64_t draw_arg_max() const;
  int64_t draw_whole(double uniform, double* total);
  int64_t draw_top_p(double uniform, double* total);
  int64_t draw_top_k(double uniform, double* total);
  int64_t draw_by_block(double uniform, double* total) const;
  void keep_top_p();

  LogitsRow row_;
  SamplerParameters parameters_;
  MassScale scale_;
  KeptValues kept_;
  std::vector<SoftmaxState<float>> states_;
  std::vector<float> tempered_sums_;
  std::vector<float> strand_peaks_;
  // For each block: the mass that is kept, and how many ties of the least kept value lie in the blocks
  // before.
  std::vector<double> block_masses_;
  std::vector<int64_t> ties_before_;
  std::vector<Candidate> candidates_;
  std::vector<float> room_;
  TopK topk_;
};

}  // namespace tq
