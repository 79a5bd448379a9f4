// Every schema of the package. A parameter that is one number or one a row comes as a pair: the
// number, and an optional tensor that takes its place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tq_fast, m) {
  m.def("cpu_isa() -> str");
  m.def("limit_cpu_isa(str name) -> ()");
  m.def(
      "topk_logprobs(Tensor logits, int k, float temperature, Tensor? temperatures, int vocab_size)"
      " -> (Tensor ids, Tensor logprobs, Tensor lse)");
}
