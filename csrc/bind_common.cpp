// tq_fast._common: the maths of csrc/common from Python, so that tests and references reach the very same code.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/gumbel.h"
#include "common/philox.h"

namespace py = pybind11;

PYBIND11_MODULE(_common, m) {
  m.doc() = "The framework-free headers that the C++ and CUDA kernels share.";
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
