// Draws one token for every row of a batch, over the threads that there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/philox.h"
#include "cpu/sampling/logits_tensor.h"
#include "cpu/sampling/row_sampler.h"
#include "cpu/tensors/contract.h"
#include "cpu/tensors/tensor_access.h"

namespace tq {

// The arguments that sample_tokens and advance_rollouts_ have in common.
struct DrawArguments {
  ElementType type;
  Tensor logits;
  Tensor keys;
  int64_t vocab_size;
  int64_t seed;
  int64_t step;
  PerRow<float> temperature;
  PerRow<int64_t> top_k;
  PerRow<double> top_p;

  DrawArguments(
      const char* op, const Tensor& logits_in, const Tensor& keys_in, int64_t step_number,
      const std::optional<Tensor>& step_tensor, double temperature_number, const std::optional<Tensor>& temperatures,
      int64_t top_k_number, const std::optional<Tensor>& top_ks, double top_p_number,
      const std::optional<Tensor>& top_ps, int64_t vocab_size_in, int64_t seed_number,
      const std::optional<Tensor>& seed_tensor)
      : type(element_type_of(logits_in, op, "logits")),
        logits(with_unit_inner_stride(logits_in)),
        keys(dense(keys_in, ScalarType::Long)),
        vocab_size(vocab_size_in),
        seed(read_int(seed_number, seed_tensor)),
        step(read_int(step_number, step_tensor)),
        temperature(static_cast<float>(temperature_number), temperatures, ScalarType::Float),
        top_k(top_k_number, top_ks, ScalarType::Long),
        top_p(top_p_number, top_ps, ScalarType::Double) {
    const int64_t rows = logits.size(0);
    require_contract(
        logits_in.dim() == 2 && is_integers(keys_in, {rows}) && vocab_size >= 1 && vocab_size <= logits_in.size(1) &&
            is_per_row(temperatures, rows, temperature_number >= 0.0) &&
            (top_ks.has_value() ? is_integers(*top_ks, {rows}) : top_k_number >= 0) &&
            is_per_row(top_ps, rows, top_p_number >= 0.0 && top_p_number <= 1.0) && is_int(step_tensor) &&
            is_int(seed_tensor),
        op);
  }

  SamplerParameters parameters(int64_t row) const { return {temperature.at(row), top_k.at(row), top_p.at(row)}; }
  double uniform(int64_t row) const {
    const int64_t key = static_cast<const int64_t*>(keys.const_data_ptr())[row];
    return philox_uniform(seed, kPurposeRollout, key, step, 0);
  }
};

// Calls finish(row, DrawnToken) once for each row that wants(row), on any thread.
template <typename Wants, typename Finish>
void draw_rows(const DrawArguments& arguments, const Wants& wants, const Finish& finish) {
  const int64_t rows = arguments.logits.size(0);
  const int64_t blocks = num_blocks(arguments.vocab_size);
  const auto row_at = [&](int64_t row) {
    return logits_row(arguments.logits, arguments.type, row, arguments.vocab_size);
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (rows >= 2 * threads || threads == 1) {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      RowSampler sampler;
      for (int64_t row = begin; row < end; ++row) {
        if (!wants(row)) continue;
        sampler.start(row_at(row), arguments.parameters(row));
        sampler.reduce(0, blocks);
        finish(row, sampler.draw(arguments.uniform(row)));
      }
    });
    return;
  }
  // Split the blocks of a row over the threads, since there are fewer rows than keep them busy.
  constexpr int64_t kMinBlocksPerPiece = 16;
  RowSampler sampler;
  for (int64_t row = 0; row < rows; ++row) {
    if (!wants(row)) continue;
    sampler.start(row_at(row), arguments.parameters(row));
    torch::stable::parallel_for(
        0, blocks, kMinBlocksPerPiece, [&](int64_t begin, int64_t end) { sampler.reduce(begin, end); });
    finish(row, sampler.draw(arguments.uniform(row)));
  }
}

}  // namespace tq
