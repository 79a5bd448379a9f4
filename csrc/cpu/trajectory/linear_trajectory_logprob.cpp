// linear_trajectory_logprob on CPU: blocks of the vocabulary through a product in fp32, our own or the
// BLAS's, each reduced while it is in cache. The logits of all tokens are never in memory together.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/linear/linear_layers.h"
#include "cpu/sampling/softmax_rows.h"
#include "cpu/simd/widen_rows.h"
#include "cpu/trajectory/logit_transform_rows.h"
#include "cpu/trajectory/trajectories.h"

namespace tq {

namespace {

// The tokens within the lengths, and the operands of their logits.
struct Problem {
  Tensor hidden;  // [N, T, D]
  Tensor weight;  // [V, D]
  ElementType type;
  LogitTransform transform;
  const float* bias;
  int64_t vocab_size;
  std::vector<int64_t> offsets;  // of each token's state, in elements of hidden
  std::vector<int64_t> tokens;

  int64_t size() const { return hidden.size(2); }
  int64_t count() const { return static_cast<int64_t>(tokens.size()); }
  bool knows(int64_t i) const { return tokens[i] >= 0 && tokens[i] < vocab_size; }
};

// A product of the BLAS makes at most this many rows of logits, over this many bytes of fp32 weight.
constexpr int64_t kRowsPerProduct = 1024;
constexpr int64_t kWeightBytesPerProduct = int64_t{16} << 20;
// A product of our kernel, by one thread, has as many rows as share a block of transposed weights, and as
// many logits as its second-level cache holds.
constexpr int64_t kRowsTogether = 16 * kMostManyTileRows;
constexpr int64_t kOutputsPerBlock = 512;

// out [m, n] = a [m, D] @ b [n, D]^T
void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(torch::stable::transpose(b, 0, 1)),
      torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
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

constexpr TokenState kNothingSeen = {
    {-std::numeric_limits<double>::infinity(), 0.0}, -std::numeric_limits<double>::infinity()};

// Reduces token i's logits of the ids [first, first + size) to num_blocks(size) parts, and keeps the logit
// of the token itself.
void reduce_logits(
    const Problem& problem, int64_t i, int64_t first, int64_t size, float* logits, SoftmaxState<float>* parts,
    double* chosen) {
  const LogitTransform& transform = problem.transform;
  if (!transform.is_identity()) TQ_SELECT_ISA(transform_logits)(transform, problem.bias + first, size, logits);
  const LogitsRow view{logits, ElementType::kFloat32, size};
  TQ_SELECT_ISA(reduce_blocks)({view, 1.0f, parts, nullptr, 1.0f, nullptr}, 0, num_blocks(size));
  const int64_t local = problem.tokens[i] - first;
  // A NaN logit counts as -inf.
  if (local >= 0 && local < size && !std::isnan(logits[local])) *chosen = logits[local];
}

// Finds the states of the tokens [begin, begin + count) by products of the BLAS.
void find_states_by_library(const Problem& problem, int64_t begin, int64_t count, TokenState* states) {
  const int64_t size = problem.size();
  const int64_t fitting = kWeightBytesPerProduct / (4 * std::max<int64_t>(size, 1)) / 16 * 16;
  const int64_t vocab_each = std::min(problem.vocab_size, std::clamp<int64_t>(fitting, 256, kBlock));
  const bool is_wide = problem.type == ElementType::kFloat32;
  const FloatRows weight_rows(problem.weight, problem.type);
  Tensor left = new_tensor({count, size}, ScalarType::Float);
  Tensor weight_block = new_tensor({is_wide ? 0 : vocab_each, size}, ScalarType::Float);
  Tensor logits_block = new_tensor({count * vocab_each}, ScalarType::Float);
  auto* const logits = static_cast<float*>(logits_block.mutable_data_ptr());
  FloatRows(problem.hidden, problem.type)
      .copy(count, [&](int64_t i) { return problem.offsets[begin + i]; }, static_cast<float*>(left.mutable_data_ptr()));
  std::fill_n(states, count, kNothingSeen);
  for (int64_t first = 0; first < problem.vocab_size; first += vocab_each) {
    const int64_t outputs = std::min(vocab_each, problem.vocab_size - first);
    if (!is_wide) {
      weight_rows.copy(
          outputs, [&](int64_t i) { return (first + i) * problem.weight.stride(0); },
          static_cast<float*>(weight_block.mutable_data_ptr()));
    }
    Tensor right = is_wide ? torch::stable::narrow(const_cast<Tensor&>(problem.weight), 0, first, outputs)
                           : torch::stable::narrow(weight_block, 0, 0, outputs);
    Tensor flat = torch::stable::narrow(logits_block, 0, 0, count * outputs);
    Tensor out = torch::stable::view(flat, {count, outputs});
    multiply(left, right, out);
    torch::stable::parallel_for(0, count, 8, [&](int64_t from, int64_t to) {
      std::vector<SoftmaxState<float>> parts(num_blocks(outputs));
      for (int64_t i = from; i < to; ++i) {
        reduce_logits(problem, begin + i, first, outputs, logits + i * outputs, parts.data(), &states[i].chosen);
        states[i].softmax = merge_softmax_states(states[i].softmax, merge_blocks(parts.data(), num_blocks(outputs)));
      }
    });
  }
}

// Finds the states of the tokens [begin, begin + count) by our product: each thread multiplies and reduces
// blocks of its own, which are merged in order.
void find_states_by_kernel(const Problem& problem, int64_t begin, int64_t count, TokenState* states) {
  const int64_t size = problem.size();
  const auto bytes = static_cast<int64_t>(problem.hidden.element_size());
  Tensor rows = new_tensor({count, size}, problem.hidden.scalar_type());
  const auto* const from = static_cast<const char*>(problem.hidden.const_data_ptr());
  auto* const to = static_cast<char*>(rows.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * size * bytes, from + problem.offsets[begin + i] * bytes, size * bytes);
  }
  Tensor packed = new_tensor({packed_bytes(count, size) + kCacheLine}, ScalarType::Byte);
  FewRowsProduct rows_product = product_of_rows(problem.type, count, size, line_of(packed.mutable_data_ptr()));
  pack_all_rows(rows_product, to, size);
  rows_product.weight_stride = problem.weight.stride(0);
  rows_product.is_out_float = true;

  const auto* const weight = static_cast<const char*>(problem.weight.const_data_ptr());
  const int64_t blocks = (problem.vocab_size + kOutputsPerBlock - 1) / kOutputsPerBlock;
  std::vector<SoftmaxState<float>> parts(count * blocks);
  std::fill_n(states, count, kNothingSeen);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first_block, int64_t last_block) {
    const std::unique_ptr<float[]> logits(new float[count * kOutputsPerBlock]);
    FewRowsProduct product = rows_product;
    product.out = logits.get();
    const MemoryRun weights{
        weight + first_block * kOutputsPerBlock * product.weight_stride * bytes,
        weight + std::min(last_block * kOutputsPerBlock, problem.vocab_size) * product.weight_stride * bytes};
    ReadAhead ahead(&weights, product.weight_stride == size ? 1 : 0);
    product.ahead = &ahead;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * kOutputsPerBlock;
      const int64_t outputs = std::min(kOutputsPerBlock, problem.vocab_size - first);
      product.weight = weight + first * product.weight_stride * bytes;
      product.size_out = outputs;
      TQ_SELECT_ISA(multiply_few_rows)(product, 0, outputs);
      for (int64_t i = 0; i < count; ++i) {
        reduce_logits(
            problem, begin + i, first, outputs, logits.get() + i * outputs, &parts[i * blocks + block],
            &states[i].chosen);
      }
    }
  });
  for (int64_t i = 0; i < count; ++i) states[i].softmax = merge_blocks(&parts[i * blocks], blocks);
}

// Whether our product beats the BLAS's: it does for bf16 pairs, which it need not widen, and on AMD, where
// MKL makes half of what the processor can do.
bool is_kernel_faster(ElementType type) {
  static const bool is_amd = cpu_has(CpuTrait::kAmd);
  return type == ElementType::kBFloat16 ? has_bf16_dot() : is_amd && current_isa() == Isa::kAvx512;
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
          vocab_size <= weight_in.size(0) && is_float_number(scale) && is_softcap(softcap),
      op);
  const Tensor hidden = with_unit_inner_stride(hidden_in);
  const Tensor weight = with_unit_inner_stride(weight_in);
  const ElementType type = element_type_of(hidden, op, "hidden");
  const Trajectories trajectories(tokens, lengths);
  const std::optional<Tensor> bias = dense(bias_in, ScalarType::Float);
  const auto* const bias_data = data_or_null<float>(bias);
  const LogitTransform transform{
      static_cast<float>(scale), static_cast<float>(softcap.value_or(0.0)), bias.has_value()};

  Problem problem{hidden, weight, type, transform, bias_data, vocab_size, {}, {}};
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < trajectories.rows * trajectories.length; ++i) {
    const int64_t row = i / trajectories.length, t = i % trajectories.length;
    if (!trajectories.counts(row, t)) continue;
    positions.push_back(i);
    problem.offsets.push_back(row * hidden.stride(0) + t * hidden.stride(1));
    problem.tokens.push_back(trajectories.tokens[i]);
  }
  const bool use_kernel = is_kernel_faster(type);
  const int64_t together = use_kernel ? kRowsTogether : kRowsPerProduct;
  std::vector<double> terms(trajectories.rows * trajectories.length);
  std::vector<TokenState> states(std::min(together, problem.count()));
  for (int64_t begin = 0; begin < problem.count(); begin += together) {
    const int64_t count = std::min(together, problem.count() - begin);
    (use_kernel ? find_states_by_kernel : find_states_by_library)(problem, begin, count, states.data());
    for (int64_t i = 0; i < count; ++i) {
      terms[positions[begin + i]] = problem.knows(begin + i) ? token_logprob(states[i].chosen, states[i].softmax)
                                                             : std::numeric_limits<double>::quiet_NaN();
    }
  }
  return trajectories.sum_rows(terms.data());
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) {
  m.impl("linear_trajectory_logprob", TORCH_BOX(&linear_trajectory_logprob_cpu));
}

}  // namespace tq
