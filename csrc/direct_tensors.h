// Tensors and numbers of a Python call, read and made without PyTorch's dispatcher.
//
// Through DLPack's C exchange interface: torch.Tensor.__dlpack_c_exchange_api__, whose layout is versioned,
// so that nothing here depends on PyTorch's own classes. The GIL is held in all of it.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <type_traits>

namespace tq {

// What torch offers, fetched once by connect_torch.
struct TorchSide {
  PyTypeObject* tensor_type;
  const DLPackExchangeAPI* exchange;
  // Python functions without arguments; a call is plain where each answers False, 0 or None.
  PyObject* is_special[4];
};

inline TorchSide& torch_side() {
  static TorchSide side{};
  return side;
}

// False with a Python error: this torch has not what is needed.
inline bool connect_torch() {
  TorchSide& side = torch_side();
  PyObject* const torch = PyImport_ImportModule("torch");
  PyObject* const inner = torch == nullptr ? nullptr : PyImport_ImportModule("torch._C");
  if (inner == nullptr) return false;
  side.tensor_type = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(torch, "Tensor"));
  if (side.tensor_type == nullptr) return false;
  PyObject* const capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(side.tensor_type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return false;
  side.exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (side.exchange == nullptr) return false;
  if (side.exchange->header.version.major != DLPACK_MAJOR_VERSION) {
    PyErr_SetString(PyExc_ImportError, "torch speaks another major version of DLPack");
    return false;
  }
  // Autograd, modes of __torch_dispatch__ (fake tensors, tracing by make_fx) and of __torch_function__,
  // torch.jit.trace.
  int idx = 0;
  for (const char* name :
       {"is_grad_enabled", "_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state"}) {
    side.is_special[idx] = PyObject_GetAttrString(inner, name);
    if (side.is_special[idx++] == nullptr) return false;
  }
  return true;
}

// Whether nobody but the kernel has to hear of this call. Not asked: torch.compile, which does not come here.
inline bool is_plain_call() {
  for (PyObject* const ask : torch_side().is_special) {
    PyObject* const answer = PyObject_CallNoArgs(ask);
    if (answer == nullptr) {
      PyErr_Clear();
      return false;
    }
    const bool is_no = answer == Py_False || answer == Py_None || (PyLong_Check(answer) && PyLong_AsLong(answer) == 0);
    Py_DECREF(answer);
    if (!is_no) return false;
  }
  return true;
}

// What DLPack tells of a tensor, without owning it; false, without a Python error, for anything else, and for
// a subclass too, whose own functions would have to be asked.
inline bool view_tensor(PyObject* object, DLTensor* view) {
  if (Py_TYPE(object) != torch_side().tensor_type) return false;
  if (torch_side().exchange->dltensor_from_py_object_no_sync(object, view) == 0) return true;
  // It has no memory of its own, as under vmap: torch.ops knows what to do.
  PyErr_Clear();
  return false;
}

// The sizes of a tensor of as many axes.
template <int kAxes>
bool read_sizes(PyObject* object, int64_t (&sizes)[kAxes]) {
  DLTensor view;
  if (!view_tensor(object, &view) || view.ndim != kAxes) return false;
  for (int axis = 0; axis < kAxes; ++axis) sizes[axis] = view.shape[axis];
  return true;
}

// The numbers of a dense CPU tensor of these sizes and this type; None, where it may be, is a null pointer.
template <typename Number>
bool read_numbers(
    PyObject* object, std::initializer_list<int64_t> sizes, const Number** numbers, bool may_be_none = false) {
  *numbers = nullptr;
  if (may_be_none && object == Py_None) return true;
  DLTensor view;
  if (!view_tensor(object, &view) || view.device.device_type != kDLCPU) return false;
  if (view.dtype.code != (std::is_integral<Number>::value ? kDLInt : kDLFloat)) return false;
  if (view.dtype.bits != 8 * sizeof(Number) || view.ndim != static_cast<int32_t>(sizes.size())) return false;
  int64_t stride = 1;
  for (int32_t axis = view.ndim - 1; axis >= 0; --axis) {
    // Asked of axes of one element too: so no view of complex numbers passes, which may be negated lazily.
    if (view.shape[axis] != sizes.begin()[axis] || view.strides[axis] != stride) return false;
    stride *= view.shape[axis];
  }
  // Null for a tensor without elements, and for one of zeros that nobody has written down.
  *numbers = static_cast<const Number*>(view.data);
  return view.data != nullptr;
}

// Python's own numbers; false, without a Python error, for anything else.
inline bool read_number(PyObject* object, int64_t* number) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  *number = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

inline bool read_number(PyObject* object, double* number) {
  if (PyFloat_CheckExact(object)) {
    *number = PyFloat_AS_DOUBLE(object);
    return true;
  }
  int64_t whole = 0;
  if (!read_number(object, &whole)) return false;
  *number = static_cast<double>(whole);
  return true;
}

inline bool read_number(PyObject* object, bool* number) {
  *number = object == Py_True;
  return PyBool_Check(object);
}

// The outputs of one call: tensors side by side in one allocation, which lives until the last of them is
// gone. They do not overlap and none knows of the others: writing into one leaves the rest as it is.
template <int kTensors>
class Outputs {
 public:
  struct Spec {
    DLDataTypeCode code;
    uint8_t bits;
    int64_t sizes[2];
    int32_t axes;
  };

  // Null without memory.
  static Outputs* make(const Spec (&specs)[kTensors]) {
    int64_t bytes = whole_lines(sizeof(Outputs));
    for (const Spec& spec : specs) bytes += num_bytes(spec);
    void* const memory = ::operator new(bytes, kAlignment, std::nothrow);
    return memory == nullptr ? nullptr : new (memory) Outputs(specs);
  }

  template <typename Number>
  Number* numbers(int idx) const {
    return static_cast<Number*>(tensors_[idx].dl_tensor.data);
  }

  // The tensors in a new `type`, a NamedTuple, which they belong to from now on; null with a Python error.
  PyObject* release(PyTypeObject* type) {
    PyObject* result = type->tp_alloc(type, kTensors);
    int idx = 0;
    for (; result != nullptr && idx < kTensors; ++idx) {
      void* tensor = nullptr;
      // Whether it works or not, the memory of this one is no longer ours.
      if (torch_side().exchange->managed_tensor_to_py_object_no_sync(&tensors_[idx], &tensor) != 0) {
        Py_CLEAR(result);
      } else {
        PyTuple_SET_ITEM(result, idx, static_cast<PyObject*>(tensor));
      }
    }
    for (; idx < kTensors; ++idx) forget(&tensors_[idx]);
    return result;
  }

  // Instead of `release`, where nothing came of the call.
  void discard() {
    for (DLManagedTensorVersioned& tensor : tensors_) forget(&tensor);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};

  static int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t num_bytes(const Spec& spec) {
    return whole_lines(spec.sizes[0] * (spec.axes == 2 ? spec.sizes[1] : 1) * spec.bits / 8);
  }

  explicit Outputs(const Spec (&specs)[kTensors]) : alive_(kTensors) {
    char* data = reinterpret_cast<char*>(this) + whole_lines(sizeof(Outputs));
    for (int idx = 0; idx < kTensors; ++idx) {
      const Spec& spec = specs[idx];
      Layout& layout = layouts_[idx];
      layout = Layout{{spec.sizes[0], spec.sizes[1]}, {spec.axes == 2 ? spec.sizes[1] : 1, 1}};
      DLManagedTensorVersioned& tensor = tensors_[idx];
      tensor = {};
      tensor.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
      tensor.manager_ctx = this;
      tensor.deleter = &Outputs::forget;
      tensor.dl_tensor.data = data;
      tensor.dl_tensor.device = {kDLCPU, 0};
      tensor.dl_tensor.ndim = spec.axes;
      tensor.dl_tensor.dtype = {static_cast<uint8_t>(spec.code), spec.bits, 1};
      tensor.dl_tensor.shape = layout.sizes;
      tensor.dl_tensor.strides = layout.strides;
      data += num_bytes(spec);
    }
  }

  // Called by whoever has the tensor last, on any thread.
  static void forget(DLManagedTensorVersioned* tensor) {
    Outputs* const self = static_cast<Outputs*>(tensor->manager_ctx);
    if (self->alive_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      self->~Outputs();
      ::operator delete(self, kAlignment);
    }
  }

  struct Layout {
    int64_t sizes[2];
    int64_t strides[2];
  };

  std::atomic<int> alive_;
  DLManagedTensorVersioned tensors_[kTensors];
  Layout layouts_[kTensors];
};

}  // namespace tq
