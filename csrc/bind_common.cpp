// tq_fast._common: the maths of csrc/common from Python, so that tests and references reach the very same code.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/gumbel.h"
#include "common/online_softmax.h"
#include "common/ordered_key.h"
#include "common/philox.h"
#include "common/reweight.h"

namespace py = pybind11;

namespace {

void bind_random(py::module_& m) {
  m.attr("PURPOSE_ROLLOUT") = tq::kPurposeRollout;
  m.attr("PURPOSE_CHOICE") = tq::kPurposeChoice;
  m.def(
      "philox4x32",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
        const tq::PhiloxWords out = tq::philox4x32({c0, c1, c2, c3}, key0, key1);
        return py::make_tuple(out.w0, out.w1, out.w2, out.w3);
      },
      py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"), py::arg("key0"), py::arg("key1"),
      "Ten rounds of Philox4x32 on one counter: four 32-bit words.");
  m.def(
      "uniform", &tq::philox_uniform, py::arg("seed"), py::arg("purpose"), py::arg("key"), py::arg("step"),
      py::arg("index"), "The float64 uniform in (0, 1) of one named draw.");
  m.def(
      "choice_gumbel", &tq::choice_gumbel, py::arg("seed"), py::arg("key"), py::arg("step"), py::arg("token_id"),
      "The float64 Gumbel noise of one token id at one decoding step.");
}

py::tuple value_candidate(
    const std::vector<double>& rewards, const std::optional<std::vector<double>>& log_weights, double alpha,
    bool is_soft) {
  if (log_weights.has_value() && log_weights->size() != rewards.size()) {
    throw std::invalid_argument("log_weights and rewards differ in length");
  }
  const tq::CandidateValue value = tq::value_candidate(
      rewards.data(), log_weights.has_value() ? log_weights->data() : nullptr, static_cast<int64_t>(rewards.size()),
      alpha, is_soft);
  return py::make_tuple(value.q, value.standard_error, value.ess);
}

}  // namespace

PYBIND11_MODULE(_common, m) {
  m.doc() = "The framework-free headers that the C++ and CUDA kernels share.";
  bind_random(m);
  m.def(
      "ordered_key", &tq::ordered_key, py::arg("value"), py::arg("id"),
      "The 64-bit key that orders candidates by value descending, then id ascending.");
  m.def("value_of_key", &tq::value_of_key, py::arg("key"), "The value in an ordered key.");
  m.def("id_of_key", &tq::id_of_key, py::arg("key"), "The id in an ordered key.");
  m.def(
      "merge_softmax",
      [](std::pair<double, double> a, std::pair<double, double> b) {
        const auto merged = tq::merge_softmax_states<double>({a.first, a.second}, {b.first, b.second});
        return py::make_tuple(merged.peak, merged.sum);
      },
      py::arg("a"), py::arg("b"), "Two (peak, sum of exp(x - peak)) states as one; (-inf, 0) is the empty set.");
  m.def(
      "value_candidate", &value_candidate, py::arg("rewards"), py::arg("log_weights"), py::arg("alpha"),
      py::arg("is_soft"), "(q, standard error, ess) of one candidate from its roll-outs.");
}
