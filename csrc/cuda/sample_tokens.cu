// sample_tokens on CUDA: one launch, a group of blocks for each row (cuda/draw_row.h).
#include <tuple>

#include "cuda/draw_launch.h"

namespace tq {

namespace {

struct TokenSink {
  int64_t* ids;
  float* logprobs;
  float* proposal_logprobs;
  bool* valid;
  __device__ bool wants(int64_t) const { return true; }
  __device__ void take(int64_t row, const DrawnToken& token) const {
    ids[row] = token.id;
    logprobs[row] = token.logprob;
    proposal_logprobs[row] = token.proposal_logprob;
    valid[row] = token.is_valid;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens_cuda(
    const Tensor& logits, const Tensor& keys, int64_t step, const std::optional<Tensor>& step_tensor,
    double temperature, const std::optional<Tensor>& temperatures, int64_t top_k, const std::optional<Tensor>& top_ks,
    double top_p, const std::optional<Tensor>& top_ps, int64_t vocab_size, int64_t seed,
    const std::optional<Tensor>& seed_tensor) {
  const int32_t device = device_of("sample_tokens", logits);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const DrawArguments arguments(
      "sample_tokens", logits, keys, step, step_tensor, temperature, temperatures, top_k, top_ks, top_p, top_ps,
      vocab_size, seed, seed_tensor);
  const int64_t rows = logits.size(0);
  Tensor ids = new_cuda_tensor(device, {rows}, ScalarType::Long);
  Tensor logprobs = new_cuda_tensor(device, {rows}, ScalarType::Float);
  Tensor proposal_logprobs = new_cuda_tensor(device, {rows}, ScalarType::Float);
  Tensor valid = new_cuda_tensor(device, {rows}, ScalarType::Bool);
  draw_rows(
      arguments,
      TokenSink{
          static_cast<int64_t*>(ids.mutable_data_ptr()), static_cast<float*>(logprobs.mutable_data_ptr()),
          static_cast<float*>(proposal_logprobs.mutable_data_ptr()), static_cast<bool*>(valid.mutable_data_ptr())});
  return {ids, logprobs, proposal_logprobs, valid};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CUDA, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens_cuda)); }

}  // namespace tq
