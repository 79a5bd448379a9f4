// topk_logprobs on CPU: one pass over the logits feeds the lse and a queue of where the k largest are.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "common/ordered_key.h"
#include "cpu/contract.h"
#include "cpu/softmax_rows.h"
#include "cpu/tensor_access.h"

namespace tq {

namespace {

// Rows are split over threads where they are few; a piece has at least this many blocks.
constexpr int64_t kMinBlocksPerPiece = 8;
// A row of fewer blocks is done before another thread is awake.
constexpr int64_t kMinBlocksToCut = 32;

struct Output {
  int64_t* ids;
  float* logprobs;
  float* lse;
};

// `keys` is room that may grow.
void finish_row(
    const LogitsRow& logits, float divisor, TopKQueue* queue, std::vector<uint64_t>& keys, SoftmaxState<double> state,
    int64_t row, const Output& out) {
  topk_shrink(queue);
  const int64_t k = queue->k;
  keys.resize(queue->size * kStrandLength);
  const int64_t num_keys = TQ_SELECT_ISA(gather_strands)(logits, divisor, *queue, keys.data());
  std::partial_sort(keys.begin(), keys.begin() + k, keys.begin() + num_keys, std::greater<uint64_t>());
  const double log_sum = std::log(state.sum);
  const bool is_empty = state.sum == 0.0;
  for (int64_t i = 0; i < k; ++i) {
    const double value = value_of_key(keys[i]);
    out.ids[row * k + i] = id_of_key(keys[i]);
    out.logprobs[row * k + i] =
        is_empty ? -std::numeric_limits<float>::infinity() : static_cast<float>(value - state.peak - log_sum);
  }
  out.lse[row] = static_cast<float>(lse_of_softmax_state(state));
}

// One row cut into pieces of whole blocks.
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
  const int64_t room = queue_room(k);
  const auto reduce_blocks = TQ_SELECT_ISA(reduce_blocks);

  if (pieces.per_row == 1) {
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<SoftmaxState<float>> states(blocks);
      std::vector<uint64_t> strands(room), keys;
      for (int64_t row = begin; row < end; ++row) {
        TopKQueue queue = start_queue(strands.data(), k);
        const LogitsRow whole = logits_row(logits, type, row, vocab_size);
        reduce_blocks({whole, divisors.at(row), states.data(), nullptr, 1.0f, &queue}, 0, blocks);
        finish_row(whole, divisors.at(row), &queue, keys, merge_blocks(states.data(), blocks), row, out);
      }
    });
    return {ids, logprobs, lse};
  }

  const int64_t num_pieces = rows * pieces.per_row;
  std::vector<SoftmaxState<float>> states(rows * blocks);
  const std::unique_ptr<uint64_t[]> strands(new uint64_t[num_pieces * room]);
  std::vector<int64_t> sizes(num_pieces);
  torch::stable::parallel_for(0, num_pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / pieces.per_row;
      const int64_t first = piece % pieces.per_row * pieces.blocks_each;
      TopKQueue queue = start_queue(strands.get() + piece * room, k);
      const LogitsRow whole = logits_row(logits, type, row, vocab_size);
      reduce_blocks(
          {whole, divisors.at(row), states.data() + row * blocks, nullptr, 1.0f, &queue}, first,
          std::min(first + pieces.blocks_each, blocks));
      sizes[piece] = queue.size;
    }
  });
  std::vector<uint64_t> merged, keys;
  for (int64_t row = 0; row < rows; ++row) {
    merged.clear();
    for (int64_t piece = row * pieces.per_row; piece < (row + 1) * pieces.per_row; ++piece) {
      const uint64_t* const from = strands.get() + piece * room;
      merged.insert(merged.end(), from, from + sizes[piece]);
    }
    TopKQueue queue = start_queue(merged.data(), k);
    queue.size = static_cast<int64_t>(merged.size());
    const LogitsRow whole = logits_row(logits, type, row, vocab_size);
    const SoftmaxState<double> state = merge_blocks(states.data() + row * blocks, blocks);
    finish_row(whole, divisors.at(row), &queue, keys, state, row, out);
  }
  return {ids, logprobs, lse};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs_cpu)); }

}  // namespace tq
