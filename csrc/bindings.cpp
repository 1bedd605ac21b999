// Declares every operator's schema and the Python module; csrc/<op>/ implements.
//
// The module has constants only: operators are reached as torch.ops.carillon.<op>.
#include <Python.h>

#include <torch/library.h>
#include <torch/version.h>

TORCH_LIBRARY(carillon, m) {
  m.def("image_normalize(Tensor images, float[] mean, float[] std, ScalarType dtype) -> Tensor");
  m.def(
      "fp8_cast(Tensor x, str granularity, ScalarType dtype, Tensor? scale=None, *, "
      "bool column=False, bool power_of_two=False, bool check_finite=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#ifdef CARILLON_WITH_CUDA
static constexpr long kWithCuda = 1;
#else
static constexpr long kWithCuda = 0;
#endif

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", "Native operators of carillon.", -1, nullptr, nullptr, nullptr,
    nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&module_definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "TORCH_VERSION", TORCH_VERSION) < 0 ||
      PyModule_AddObjectRef(module, "WITH_CUDA", kWithCuda ? Py_True : Py_False) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
