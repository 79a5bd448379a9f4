// linear_trajectory_logprob on CPU: blocks of the vocabulary through the BLAS in fp32, each reduced
// while it is in cache. The logits of all tokens are never in memory together.
#include <algorithm>
#include <array>
#include <vector>

#include "cpu/logit_rows.h"
#include "cpu/softmax_rows.h"
#include "cpu/trajectories.h"

namespace tq {

namespace {

// One matrix product makes at most this many rows of logits, over this many bytes of fp32 weight.
constexpr int64_t kRowsPerProduct = 1024;
constexpr int64_t kWeightBytesPerProduct = int64_t{16} << 20;

// out [m, n] = a [m, D] @ b [n, D]^T
void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(torch::stable::transpose(b, 0, 1)),
      torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result owns a reference
}

// Rows of a matrix of any strides, in fp32.
class FloatRows {
 public:
  FloatRows(const Tensor& matrix, ElementType type) : matrix_(matrix), type_(type) {}

  // to[i] = row(i), i in [0, count).
  template <typename RowOffset>
  void copy(int64_t count, const RowOffset& offset_of, float* to) const {
    const int64_t size = matrix_.size(matrix_.dim() - 1);
    const auto* const base = static_cast<const char*>(matrix_.const_data_ptr());
    const auto bytes = static_cast<int64_t>(matrix_.element_size());
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        TQ_SELECT_ISA(widen)(base + offset_of(i) * bytes, type_, size, to + i * size);
      }
    });
  }

 private:
  Tensor matrix_;
  ElementType type_;
};

struct TokenState {
  SoftmaxState<double> softmax;
  double chosen;  // the logit of the token, once its block has come by
};

// Takes one block of logits, [rows, size] floats that begin at id `first`, into the states.
void take_block(
    float* logits, int64_t rows, int64_t size, int64_t first, const LogitTransform& transform, const float* bias,
    const int64_t* token_of_row, TokenState* states) {
  const int64_t blocks = num_blocks(size);
  torch::stable::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    std::vector<SoftmaxState<float>> parts(blocks);
    for (int64_t row = begin; row < end; ++row) {
      float* const values = logits + row * size;
      if (!transform.is_identity()) TQ_SELECT_ISA(transform_logits)(transform, bias + first, size, values);
      const LogitsRow view{values, ElementType::kFloat32, size};
      TQ_SELECT_ISA(reduce_blocks)({view, 1.0f, parts.data(), nullptr, 1.0f, nullptr}, 0, blocks);
      TokenState& state = states[row];
      state.softmax = merge_softmax_states(state.softmax, merge_blocks(parts.data(), blocks));
      const int64_t local = token_of_row[row] - first;
      // A NaN logit counts as -inf.
      if (local >= 0 && local < size && !std::isnan(values[local])) state.chosen = values[local];
    }
  });
}

}  // namespace

Tensor linear_trajectory_logprob_cpu(
    const Tensor& hidden_in, const Tensor& weight_in, const Tensor& tokens, const Tensor& lengths,
    const std::optional<Tensor>& bias_in, double scale, std::optional<double> softcap, int64_t vocab_size) {
  const char* const op = "linear_trajectory_logprob";
  require_contract(
      Trajectories::are(tokens, lengths, hidden_in) && weight_in.dim() == 2 && weight_in.size(1) == hidden_in.size(2) &&
          weight_in.scalar_type() == hidden_in.scalar_type() &&
          (!bias_in.has_value() || is_floats(*bias_in, {weight_in.size(0)})) && vocab_size >= 1 &&
          vocab_size <= weight_in.size(0) && !(softcap.has_value() && !(*softcap > 0.0)),
      op);
  const Tensor hidden = with_unit_inner_stride(hidden_in);
  const Tensor weight = with_unit_inner_stride(weight_in);
  const ElementType type = element_type_of(hidden, op, "hidden");
  const Trajectories trajectories(tokens, lengths);
  const int64_t size = hidden.size(2);
  const std::optional<Tensor> bias = dense(bias_in, ScalarType::Float);
  const auto* const bias_data = data_or_null<float>(bias);
  const LogitTransform transform{
      static_cast<float>(scale), static_cast<float>(softcap.value_or(0.0)), bias.has_value()};

  std::vector<int64_t> counted;
  for (int64_t i = 0; i < trajectories.rows * trajectories.length; ++i) {
    if (trajectories.counts(i / trajectories.length, i % trajectories.length)) counted.push_back(i);
  }
  const int64_t num_counted = static_cast<int64_t>(counted.size());
  const int64_t rows_each = std::max<int64_t>(1, std::min(num_counted, kRowsPerProduct));
  const int64_t fitting = kWeightBytesPerProduct / (4 * std::max<int64_t>(size, 1)) / 16 * 16;
  const int64_t vocab_each = std::min(vocab_size, std::clamp<int64_t>(fitting, 256, kBlock));

  const bool is_wide = weight.scalar_type() == ScalarType::Float;
  const FloatRows hidden_rows(hidden, type);
  const FloatRows weight_rows(weight, type);
  Tensor states_matrix = new_tensor({rows_each, size}, ScalarType::Float);
  Tensor weight_block = new_tensor({is_wide ? 0 : vocab_each, size}, ScalarType::Float);
  Tensor logits_block = new_tensor({rows_each * vocab_each}, ScalarType::Float);
  auto* const logits = static_cast<float*>(logits_block.mutable_data_ptr());

  std::vector<double> terms(trajectories.rows * trajectories.length);
  std::vector<TokenState> states(rows_each);
  std::vector<int64_t> token_of_row(rows_each);
  for (int64_t begin = 0; begin < num_counted; begin += rows_each) {
    const int64_t rows = std::min(rows_each, num_counted - begin);
    hidden_rows.copy(
        rows,
        [&](int64_t i) {
          const int64_t at = counted[begin + i];
          return at / trajectories.length * hidden.stride(0) + at % trajectories.length * hidden.stride(1);
        },
        static_cast<float*>(states_matrix.mutable_data_ptr()));
    for (int64_t i = 0; i < rows; ++i) {
      token_of_row[i] = trajectories.tokens[counted[begin + i]];
      states[i] = {empty_softmax_state<double>(), -std::numeric_limits<double>::infinity()};
    }
    const Tensor left = torch::stable::narrow(states_matrix, 0, 0, rows);
    for (int64_t first = 0; first < vocab_size; first += vocab_each) {
      const int64_t count = std::min(vocab_each, vocab_size - first);
      if (!is_wide) {
        weight_rows.copy(
            count, [&](int64_t i) { return (first + i) * weight.stride(0); },
            static_cast<float*>(weight_block.mutable_data_ptr()));
      }
      Tensor right = is_wide ? torch::stable::narrow(const_cast<Tensor&>(weight), 0, first, count)
                             : torch::stable::narrow(weight_block, 0, 0, count);
      Tensor flat = torch::stable::narrow(logits_block, 0, 0, rows * count);
      Tensor out = torch::stable::view(flat, {rows, count});
      multiply(left, right, out);
      take_block(logits, rows, count, first, transform, bias_data, token_of_row.data(), states.data());
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool is_known = token_of_row[i] >= 0 && token_of_row[i] < vocab_size;
      terms[counted[begin + i]] =
          is_known ? token_logprob(states[i].chosen, states[i].softmax) : std::numeric_limits<double>::quiet_NaN();
    }
  }
  return trajectories.sum_rows(terms.data());
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) {
  m.impl("linear_trajectory_logprob", TORCH_BOX(&linear_trajectory_logprob_cpu));
}

}  // namespace tq
