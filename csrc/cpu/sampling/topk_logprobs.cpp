// topk_logprobs on CPU: one pass over the logits feeds the lse and shows where the k largest are.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "common/ordered_key.h"
#include "cpu/sampling/logits_tensor.h"
#include "cpu/sampling/softmax_rows.h"
#include "cpu/sampling/topk.h"
#include "cpu/tensors/contract.h"
#include "cpu/tensors/tensor_access.h"

namespace tq {

namespace {

// Few rows are split over the threads, in pieces of at least this many blocks.
constexpr int64_t kMinBlocksPerPiece = 8;
// A row of fewer blocks is not split: one thread is done before another is awake.
constexpr int64_t kMinBlocksToCut = 32;

struct Output {
  int64_t* ids;
  float* logprobs;
  float* lse;
};

// Room for what reduce_blocks finds of one row.
struct Reduced {
  std::vector<SoftmaxState<float>> states;
  std::unique_ptr<float[]> strand_peaks;

  explicit Reduced(int64_t blocks) : states(blocks), strand_peaks(new float[blocks * kGroup]) {}
};

void finish_row(
    const LogitsRow& logits, float divisor, const SoftmaxState<float>* states, const float* strand_peaks, TopK& topk,
    int64_t k, int64_t row, const Output& out) {
  const uint64_t* const keys = topk.find(logits, divisor, states, strand_peaks, k);
  const SoftmaxState<double> state = merge_blocks(states, num_blocks(logits.size));
  const double log_sum = std::log(state.sum);
  const bool is_empty = state.sum == 0.0;
  for (int64_t i = 0; i < k; ++i) {
    const double logprob = value_of_key(keys[i]) - state.peak - log_sum;
    out.ids[row * k + i] = id_of_key(keys[i]);
    // Rounding of the sum may lift the log-probability of a token with all the mass above 0; NaN stays.
    out.logprobs[row * k + i] =
        is_empty ? -std::numeric_limits<float>::infinity() : static_cast<float>(logprob > 0.0 ? 0.0 : logprob);
  }
  out.lse[row] = static_cast<float>(lse_of_softmax_state(state));
}

// Reduces one row in pieces of whole blocks, on all threads.
struct Pieces {
  int64_t per_row;
  int64_t blocks_each;
};

Pieces cut_rows(int64_t rows, int64_t blocks) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t per_row = 1;
  if (rows < 2 * threads && rows * blocks >= kMinBlocksToCut) {
    per_row = std::clamp<int64_t>(blocks / kMinBlocksPerPiece, 1, 2 * threads);
  }
  const int64_t blocks_each = (blocks + per_row - 1) / per_row;
  per_row = (blocks + blocks_each - 1) / blocks_each;
  return {per_row, blocks_each};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> topk_logprobs_cpu(
    const Tensor& logits_in, int64_t k, double temperature, const std::optional<Tensor>& temperatures,
    int64_t vocab_size) {
  const char* const op = "topk_logprobs";
  require_contract(
      logits_in.dim() == 2 && vocab_size >= 1 && vocab_size <= logits_in.size(1) && k >= 1 && k <= vocab_size &&
          is_per_row(temperatures, logits_in.size(0), temperature >= std::numeric_limits<float>::min()),
      op);
  const ElementType type = element_type_of(logits_in, op, "logits");
  const Tensor logits = with_unit_inner_stride(logits_in);
  const int64_t rows = logits.size(0);
  const PerRow<float> divisors(static_cast<float>(temperature), temperatures, ScalarType::Float);
  Tensor ids = new_tensor({rows, k}, ScalarType::Long);
  Tensor logprobs = new_tensor({rows, k}, ScalarType::Float);
  Tensor lse = new_tensor({rows}, ScalarType::Float);
  const Output out{
      static_cast<int64_t*>(ids.mutable_data_ptr()), static_cast<float*>(logprobs.mutable_data_ptr()),
      static_cast<float*>(lse.mutable_data_ptr())};

  const int64_t blocks = num_blocks(vocab_size);
  const Pieces pieces = cut_rows(rows, blocks);
  const auto reduce_blocks = TQ_SELECT_ISA(reduce_blocks);
  const auto row_at = [&](int64_t row) { return logits_row(logits, type, row, vocab_size); };

  if (pieces.per_row == 1) {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      Reduced reduced(blocks);
      TopK topk;
      for (int64_t row = begin; row < end; ++row) {
        const float divisor = divisors.at(row);
        float* const peaks = reduced.strand_peaks.get();
        reduce_blocks({row_at(row), divisor, reduced.states.data(), nullptr, 1.0f, peaks}, 0, blocks);
        finish_row(row_at(row), divisor, reduced.states.data(), peaks, topk, k, row, out);
      }
    });
    return {ids, logprobs, lse};
  }

  Reduced reduced(rows * blocks);
  const auto states_of = [&](int64_t row) { return reduced.states.data() + row * blocks; };
  const auto peaks_of = [&](int64_t row) { return reduced.strand_peaks.get() + row * blocks * kGroup; };
  torch::stable::parallel_for(0, rows * pieces.per_row, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / pieces.per_row;
      const int64_t first = piece % pieces.per_row * pieces.blocks_each;
      reduce_blocks(
          {row_at(row), divisors.at(row), states_of(row), nullptr, 1.0f, peaks_of(row)}, first,
          std::min(first + pieces.blocks_each, blocks));
    }
  });
  TopK topk;
  for (int64_t row = 0; row < rows; ++row) {
    finish_row(row_at(row), divisors.at(row), states_of(row), peaks_of(row), topk, k, row, out);
  }
  return {ids, logprobs, lse};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs_cpu)); }

}  // namespace tq
