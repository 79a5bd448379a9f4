// topk_logprobs on CUDA: one launch, a group of blocks for each row (cuda/topk_row.h).
#include <tuple>

#include "cuda/launch.h"
#include "cuda/topk_row.h"

namespace tq {

namespace {

template <typename Type>
__global__ void __launch_bounds__(kThreads) topk_logprobs_kernel(const TopKRows rows) {
  topk_row<Type>(rows);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> topk_logprobs_cuda(
    const Tensor& logits_in, int64_t k, double temperature, const std::optional<Tensor>& temperatures_in,
    int64_t vocab_size) {
  STD_TORCH_CHECK(
      k >= 1 && k <= kMostTopK && k <= vocab_size, "topk_logprobs: k is ", k, ", expected 1 to ", kMostTopK);
  STD_TORCH_CHECK(
      vocab_size <= kMostVocabOfTopK, "topk_logprobs: vocab_size is ", vocab_size, ", expected at most ",
      kMostVocabOfTopK);
  const int32_t device = device_of("topk_logprobs", logits_in);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor logits = with_unit_inner_stride(logits_in);
  const std::optional<Tensor> temperatures = dense(temperatures_in, ScalarType::Float);
  const int64_t num_rows = logits.size(0);
  Tensor ids = new_cuda_tensor(device, {num_rows, k}, ScalarType::Long);
  Tensor logprobs = new_cuda_tensor(device, {num_rows, k}, ScalarType::Float);
  Tensor lse = new_cuda_tensor(device, {num_rows}, ScalarType::Float);
  const TopKRows rows{
      logits.const_data_ptr(),
      logits.stride(0),
      static_cast<int>(vocab_size),
      static_cast<int>(k),
      static_cast<float>(temperature),
      data_or_null<float>(temperatures),
      static_cast<int64_t*>(ids.mutable_data_ptr()),
      static_cast<float*>(logprobs.mutable_data_ptr()),
      static_cast<float*>(lse.mutable_data_ptr())};
  for_element_type(logits, "topk_logprobs", [&](auto type) {
    launch_rows(
        topk_logprobs_kernel<decltype(type)>, rows, num_rows, num_tiles(vocab_size),
        topk_shared_bytes(rows.vocab_size, rows.k), current_stream(device));
  });
  return {ids, logprobs, lse};
}

STABLE_TORCH_LIBRARY_IMPL(tq_fast, CUDA, m) { m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs_cuda)); }

}  // namespace tq
