// tq_fast._direct: small CPU ops called from Python without PyTorch's dispatcher, which takes several times
// as long as such an op does.
//
// A call that is not the plain case, dense CPU tensors of the usual types and Python's own numbers with
// autograd off, answers NotImplemented and has done nothing: the caller goes through torch.ops then, which
// does what is asked or says what is wrong.
#include "direct_tensors.h"

#include <cmath>
#include <exception>

#include "cpu/reweight_job.h"

namespace tq {

namespace {

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

bool read_estimator(PyObject* object, bool* is_soft) {
  if (!PyUnicode_CheckExact(object)) return false;
  *is_soft = PyUnicode_CompareWithASCIIString(object, "soft") == 0;
  return *is_soft || PyUnicode_CompareWithASCIIString(object, "mean") == 0;
}

// reweight_sample(type, prior_logprobs, token_ids, rewards, log_weights, lengths, alpha, estimator, greedy,
// seed, keys, step), `type` being the NamedTuple of the answer.
PyObject* reweight_sample(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 12) {
    PyErr_Format(PyExc_TypeError, "reweight_sample takes 12 arguments, not %zd", count);
    return nullptr;
  }
  ReweightJob<float> job{};
  int64_t sizes[3];
  const bool is_plain =
      is_plain_call() && read_sizes(arguments[3], sizes) &&
      read_numbers(arguments[1], {sizes[0], sizes[1]}, &job.prior_logprobs) &&
      read_numbers(arguments[2], {sizes[0], sizes[1]}, &job.token_ids) &&
      read_numbers(arguments[3], {sizes[0], sizes[1], sizes[2]}, &job.rewards) &&
      read_numbers(arguments[4], {sizes[0], sizes[1], sizes[2]}, &job.log_weights, true) &&
      read_numbers(arguments[5], {sizes[0], sizes[1]}, &job.lengths, true) &&
      read_number(arguments[6], &job.alpha) && job.alpha > 0.0 && std::isfinite(job.alpha) &&
      read_estimator(arguments[7], &job.is_soft) && read_number(arguments[8], &job.is_greedy) &&
      read_number(arguments[9], &job.seed) && read_numbers(arguments[10], {sizes[0]}, &job.keys, true) &&
      read_number(arguments[11], &job.step);
  if (!is_plain) Py_RETURN_NOTIMPLEMENTED;
  job.prompts = sizes[0];
  job.k = sizes[1];
  job.n = sizes[2];

  using Answer = Outputs<5>;
  const Answer::Spec values{kDLFloat, 32, {job.prompts, job.k}, 2};
  Answer* const answer = Answer::make({{kDLInt, 64, {job.prompts, 1}, 1}, values, values, values, values});
  if (answer == nullptr) return PyErr_NoMemory();
  job.choice = answer->numbers<int64_t>(0);
  job.final_logprobs = answer->numbers<float>(1);
  job.q = answer->numbers<float>(2);
  job.q_stderr = answer->numbers<float>(3);
  job.ess = answer->numbers<float>(4);
  try {
    if (is_long(job)) {
      const WithoutGil without_gil;
      run_reweight(job);
    } else {
      run_reweight(job);
    }
  } catch (const std::exception& error) {
    answer->discard();
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return answer->release(reinterpret_cast<PyTypeObject*>(arguments[0]));
}

PyMethodDef g_methods[] = {
    {"reweight_sample", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&reweight_sample)), METH_FASTCALL,
     "reweight_sample(type, prior_logprobs, token_ids, rewards, log_weights, lengths, alpha, estimator, greedy,"
     " seed, keys, step): a `type` of tensors, or NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef g_module = {
    PyModuleDef_HEAD_INIT, "_direct", "Small CPU ops without PyTorch's dispatcher.", -1, g_methods,
    nullptr,               nullptr,   nullptr,                                      nullptr};

}  // namespace

}  // namespace tq

PyMODINIT_FUNC PyInit__direct() { return tq::connect_torch() ? PyModule_Create(&tq::g_module) : nullptr; }
