// The attention of a forest on CPU, for callers in C++.
#pragma once

#include <optional>
#include <tuple>

#include "stable_tensor.h"

namespace tq {

// out [N, H_q, T, d], which lies in memory as [N, T, H_q, d], and lse [N, H_q, T]; the arguments are those
// of the op.
std::tuple<Tensor, Tensor> shared_prefix_attention_cpu(
    const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v, const Tensor& prefix_len, const Tensor& branch_k,
    const Tensor& branch_v, const Tensor& branch_len, std::optional<double> scale, std::optional<double> softcap,
    std::optional<int64_t> window, const std::optional<Tensor>& tree_in);

}  // namespace tq
