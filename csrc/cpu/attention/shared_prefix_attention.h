// The attention of a forest on CPU, for callers in C++.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/attention/attention_pieces.h"
#include "stable_tensor.h"

namespace tq {

// What is to be attended to; the arguments of the op.
struct AttentionArguments {
  Tensor q;  // [N, H_q, T, d]
  Tensor prefix_k, prefix_v, prefix_len;
  Tensor branch_k, branch_v, branch_len;
  std::optional<double> scale, softcap;
  std::optional<int64_t> window;
  std::optional<Tensor> tree;
};

// Refuses what breaks the contract.
void check_attention(const AttentionArguments& arguments);

// out [N, H_q, T, d], uninitialised, which lies in memory as [N, T, H_q, d]: a layer reads it with its heads side
// by side.
Tensor new_attention_output(const Tensor& q);

// out and lse, as the op returns them.
std::tuple<Tensor, Tensor> attend(const AttentionArguments& arguments);

// The attention of one layer, for any number of threads that run it together.
class SharedPrefixAttention {
 public:
  // arguments: checked. out: of new_attention_output, and lse [N, H_q, T], dense, are filled in.
  SharedPrefixAttention(const AttentionArguments& arguments, Tensor& out, Tensor& lse);

  // The number of threads that pay.
  int64_t threads() const { return threads_; }

  // Adds what a thread reads, in order.
  void add_runs(const Member& member, std::vector<MemoryRun>& runs) const;

  // Does a thread's pieces of the work; all are done when every thread of the team has returned.
  void run(const Member& member, ReadAhead& ahead) const;

 private:
  Range pieces_of(const Member& member) const;

  Tensor prefix_lens_;
  Tensor branch_lens_;
  Problem problem_;
  int64_t threads_ = 1;
  std::vector<Piece> pieces_;
  double work_ = 0.0;            // of all pieces
  std::vector<double> middles_;  // of each piece: the work before it and half of its own
};

}  // namespace tq
