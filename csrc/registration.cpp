// Every schema of the package. A parameter that is one number or one a row comes as a pair: the
// number, and an optional tensor that takes its place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tq_fast, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_has(str trait) -> bool");
  m.def("limit_cpu_isa(str name) -> ()");
  m.def(
      "topk_logprobs(Tensor logits, int k, float temperature, Tensor? temperatures, int vocab_size)"
      " -> (Tensor ids, Tensor logprobs, Tensor lse)");
  m.def(
      "sample_tokens(Tensor logits, Tensor keys, int step, Tensor? step_tensor, float temperature,"
      " Tensor? temperatures, int top_k, Tensor? top_ks, float top_p, Tensor? top_ps, int vocab_size,"
      " int seed, Tensor? seed_tensor)"
      " -> (Tensor ids, Tensor logprobs, Tensor proposal_logprobs, Tensor valid)");
  m.def(
      "value_sample_tokens(Tensor logits, Tensor directions, Tensor token_embeddings, Tensor keys, int step,"
      " Tensor? step_tensor, float alpha, Tensor? alphas, float temperature, Tensor? temperatures, int top_k,"
      " Tensor? top_ks, float top_p, Tensor? top_ps, bool greedy, int vocab_size, int seed, Tensor? seed_tensor)"
      " -> (Tensor ids, Tensor prior_logprobs, Tensor guided_logprobs, Tensor kl, Tensor valid)");
  m.def(
      "advance_rollouts_(Tensor logits, Tensor keys, int step, Tensor? step_tensor, Tensor(a!) tokens,"
      " Tensor(b!) lengths, Tensor(c!) finished, Tensor(d!) logprob_sums,"
      " Tensor(e!) proposal_logprob_sums, Tensor eos, float temperature, Tensor? temperatures,"
      " int top_k, Tensor? top_ks, float top_p, Tensor? top_ps, int vocab_size, int seed,"
      " Tensor? seed_tensor) -> ()");
  m.def(
      "reweight_sample(Tensor prior_logprobs, Tensor token_ids, Tensor rewards, Tensor? log_weights,"
      " Tensor? lengths, float alpha, bool is_soft, bool is_greedy, int seed, Tensor? seed_tensor,"
      " Tensor? keys, int step, Tensor? step_tensor)"
      " -> (Tensor choice, Tensor final_logprobs, Tensor q, Tensor q_stderr, Tensor ess)");
  m.def(
      "trajectory_log_ratio(Tensor logits_p, Tensor logits_q, Tensor tokens, Tensor lengths,"
      " int? vocab_size) -> Tensor");
  m.def(
      "linear_trajectory_logprob(Tensor hidden, Tensor weight, Tensor tokens, Tensor lengths,"
      " Tensor? bias, float scale, float? softcap, int vocab_size) -> Tensor");
  m.def("most_few_rows(Tensor example) -> int");
  m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale=None) -> Tensor");
  m.def(
      "project_qkv(Tensor x, Tensor norm_weight, float eps, Tensor q_weight, Tensor? q_bias, Tensor? q_scale,"
      " Tensor k_weight, Tensor? k_bias, Tensor? k_scale, Tensor v_weight, Tensor? v_bias, Tensor? v_scale,"
      " Tensor cos, Tensor sin) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "finish_decoder_layer(Tensor attended, Tensor residual, Tensor o_weight, Tensor? o_bias, Tensor? o_scale,"
      " Tensor norm_weight, float eps, Tensor gate_weight, Tensor? gate_bias, Tensor? gate_scale,"
      " Tensor up_weight, Tensor? up_bias, Tensor? up_scale, Tensor down_weight, Tensor? down_bias,"
      " Tensor? down_scale) -> Tensor");
  m.def(
      "run_decoder_layers(Tensor hidden, Tensor[] weights, Tensor?[] biases, Tensor?[] weight_scales, float[] eps,"
      " Tensor? last_norm, float last_eps, Tensor cos, Tensor sin,"
      " Tensor[] prefix_k, Tensor[] prefix_v, Tensor(a!)[] branch_k, Tensor(b!)[] branch_v, Tensor prefix_len,"
      " Tensor branch_len, Tensor tree, int start, float[] scales, int[] windows) -> Tensor");
  m.def(
      "shared_prefix_attention(Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor prefix_len,"
      " Tensor branch_k, Tensor branch_v, Tensor branch_len, float? scale, float? softcap, int? window,"
      " Tensor? tree) -> (Tensor out, Tensor lse)");
}
