// advance_rollouts_ on CUDA: sample_tokens, and its outcome written into the state of each live row by
// the same launch.
#include <cmath>

#include "cuda/draw_launch.h"

namespace tq {

namespace {

// An int32 or int64 tensor of one or two axes and any strides.
struct IntegerView {
  void* data;
  int64_t outer;
  int64_t inner;
  bool is_wide;
  __device__ int64_t get(int64_t i) const {
    return is_wide ? static_cast<const int64_t*>(data)[i * outer] : static_cast<const int32_t*>(data)[i * outer];
  }
  __device__ void set(int64_t i, int64_t j, int64_t value) const {
    const int64_t offset = i * outer + j * inner;
    if (is_wide) {
      static_cast<int64_t*>(data)[offset] = value;
    } else {
      static_cast<int32_t*>(data)[offset] = static_cast<int32_t>(value);
    }
  }
};

IntegerView view_integers(const Tensor& tensor) {
  return {
      tensor.mutable_data_ptr(), tensor.stride(0), tensor.dim() > 1 ? tensor.stride(1) : 0,
      tensor.scalar_type() == ScalarType::Long};
}

template <typename T>
struct Column {
  T* data;
  int64_t stride;
  __device__ T& at(int64_t row) const { return data[row * stride]; }
};

template <typename T>
Column<T> view_column(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.stride(0)};
}

struct RolloutSink {
  IntegerView tokens;
  IntegerView lengths;
  IntegerView eos;
  int64_t num_eos;
  int64_t capacity;
  Column<bool> finished;
  Column<float> logprob_sums;
  Column<float> proposal_logprob_sums;

  __device__ bool wants(int64_t row) const {
    const int64_t length = lengths.get(row);
    return !finished.at(row) && length >= 0 && length < capacity;
  }

  __device__ void take(int64_t row, const DrawnToken& token) const {
    if (!token.is_valid) {
      finished.at(row) = true;
      logprob_sums.at(row) = NAN;
      return;
    }
    const int64_t length = lengths.get(row);
    tokens.set(row, length, token.id);
    lengths.set(row, 0, length + 1);
    logprob_sums.at(row) += token.logprob;
    proposal_logprob_sums.at(row) += token.proposal_logprob;
    for (int64_t e = 0; e < num_eos; ++e) {
      if (eos.get(e) == token.id) finished.at(row) = true;
    }
  }
};

}  // namespace

void advance_rollouts_cuda(
    const Tensor& logits, const Tensor& keys, int64_t step, const std::optional<Tensor>& step_tensor,
    const Tensor& tokens, const Tensor& lengths, const Tensor& finished, const Tensor& logprob_sums,
    const Tensor& proposal_logprob_sums, const Tensor& eos, double temperature,
    const std::optional<Tensor>& temperatures, int64_t top_k, const std::optional<Tensor>& top_ks, double top_p,
    const std::optional<Tensor>& top_ps, int64_t vocab_size, int64_t seed, const std::optional<Tensor>& seed_tensor) {
  const torch::stable::accelerator::DeviceGuard guard(device_of("advance_rollouts_", logits));
  const DrawArguments arguments(
      "advance_rollouts_", logits, keys, step, step_tensor, temperature, temperatures, top_k, top_ks, top_p, top_ps,
      vocab_size, seed, seed_tensor);
  draw_rows(
      arguments,
      RolloutSink{
          view_integers(tokens), view_integers(lengths), view_integers(eos), eos.size(0), tokens.size(1),
          view_column<bool>(finished), view_column<float>(logprob_sums), view_column<float>(proposal_logprob_sums)});
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CUDA, m) { m.impl("advance_rollouts_", TORCH_BOX(&advance_rollouts_cuda)); }

}  // namespace tq
