// run_decoder_layers on CPU: all layers of a model over a forest of shared prefixes, in one call.
#include <cstring>

#include "cpu/attention/shared_prefix_attention.h"
#include "cpu/linear/decoder_layer.h"

namespace tq {

namespace {

constexpr const char* kOp = "run_decoder_layers";

// What a layer multiplies by: norm, q, k, v, o, norm, gate, up, down.
constexpr int64_t kWeights = 9;
// The biases of q, k, v, o, gate, up, down, and the scales of their weights where those are int8.
constexpr int64_t kBiases = 7;

// branch [N, H, B, d] at the tokens from `start` on = states [N, T, H, d], dense.
void store(const Tensor& states, int64_t start, Tensor& branch) {
  const int64_t num_tokens = states.size(1), heads = states.size(2);
  const int64_t bytes = static_cast<int64_t>(states.element_size());
  const auto* from = static_cast<const char*>(states.const_data_ptr());
  auto* const to = static_cast<char*>(branch.mutable_data_ptr());
  for (int64_t row = 0; row < states.size(0); ++row) {
    for (int64_t token = 0; token < num_tokens; ++token) {
      for (int64_t head = 0; head < heads; ++head, from += states.size(3) * bytes) {
        const int64_t at = row * branch.stride(0) + head * branch.stride(1) + (start + token) * branch.stride(2);
        std::memcpy(to + at * bytes, from, states.size(3) * bytes);
      }
    }
  }
}

void check_branch(const Tensor& branch, const Tensor& states, int64_t start) {
  STD_TORCH_CHECK(
      branch.dim() == 4 && branch.size(0) == states.size(0) && branch.size(1) == states.size(2) && start >= 0 &&
          branch.size(2) >= start + states.size(1) && branch.size(3) == states.size(3) && branch.stride(3) == 1 &&
          branch.scalar_type() == states.scalar_type(),
      kOp, ": a branch buffer does not hold the new tokens");
}

}  // namespace

Tensor run_decoder_layers_cpu(
    const Tensor& hidden_in, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
    const std::vector<std::optional<Tensor>>& weight_scales, const std::vector<double>& eps, const Tensor& cos_in,
    const Tensor& sin_in, const std::vector<Tensor>& prefix_k, const std::vector<Tensor>& prefix_v,
    const std::vector<Tensor>& branch_k, const std::vector<Tensor>& branch_v, const Tensor& prefix_len,
    const Tensor& branch_len, const Tensor& tree, int64_t start, const std::vector<double>& scales,
    const std::vector<int64_t>& windows) {
  const auto count = static_cast<int64_t>(prefix_k.size());
  const auto has = [count](const auto& list, int64_t each) {
    return static_cast<int64_t>(list.size()) == each * count;
  };
  STD_TORCH_CHECK(
      has(weights, kWeights) && has(biases, kBiases) && has(weight_scales, kBiases) && has(eps, 2) &&
          has(prefix_v, 1) && has(branch_k, 1) && has(branch_v, 1) && has(scales, 1) && has(windows, 1) &&
          hidden_in.dim() == 3,
      kOp, ": the lists must have the parts of as many layers");
  Tensor hidden = torch::stable::contiguous(hidden_in);
  const ScalarType dtype = hidden.scalar_type();
  const Tensor cos = dense(cos_in, dtype);
  const Tensor sin = dense(sin_in, dtype);
  const int64_t size = hidden.size(2);
  for (int64_t i = 0; i < count; ++i) {
    const Tensor* const weight = &weights[i * kWeights];
    const std::optional<Tensor>* const bias = &biases[i * kBiases];
    const std::optional<Tensor>* const scale = &weight_scales[i * kBiases];
    const QkvWeights qkv(
        weight[0], eps[2 * i], LinearLayer(weight[1], bias[0], scale[0], size, dtype, kOp),
        LinearLayer(weight[2], bias[1], scale[1], size, dtype, kOp),
        LinearLayer(weight[3], bias[2], scale[2], size, dtype, kOp));
    const QueriesKeysValues made = project(kOp, hidden, qkv, cos, sin);
    Tensor keys = branch_k[i], values = branch_v[i];
    check_branch(keys, made.k, start);
    check_branch(values, made.v, start);
    store(made.k, start, keys);
    store(made.v, start, values);
    const std::optional<int64_t> window = windows[i] > 0 ? std::optional<int64_t>(windows[i]) : std::nullopt;
    const auto [out, lse] = shared_prefix_attention_cpu(
        torch::stable::transpose(made.q, 1, 2), prefix_k[i], prefix_v[i], prefix_len, keys, values, branch_len,
        scales[i], std::nullopt, window, tree);
    const Tensor attended = torch::stable::view(
        torch::stable::transpose(out, 1, 2), {hidden.size(0), hidden.size(1), made.q.size(2) * made.q.size(3)});
    const LinearLayer gate(weight[6], bias[4], scale[4], size, dtype, kOp);
    const FinishWeights rest(
        LinearLayer(weight[4], bias[3], scale[3], attended.size(2), dtype, kOp), weight[5], eps[2 * i + 1], gate,
        LinearLayer(weight[7], bias[5], scale[5], size, dtype, kOp),
        LinearLayer(weight[8], bias[6], scale[6], gate.size_out(), dtype, kOp));
    hidden = finish(kOp, attended, hidden, rest);
  }
  return hidden;
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CPU, m) { m.impl("run_decoder_layers", TORCH_BOX(&run_decoder_layers_cpu)); }

}  // namespace tq
