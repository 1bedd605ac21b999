// Declares every operator's schema and the Python module; csrc/<op>/ implements.
//
// The module has constants only: operators are reached as torch.ops.carillon.<op>.
#include <Python.h>

#include <ATen/Config.h>
#include <torch/library.h>
#include <torch/version.h>

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "at::parallel_for would run on one thread: compile with -fopenmp"
#endif

TORCH_LIBRARY(carillon, m) {
  m.def("limit_instruction_set(str name) -> str");
  m.def("image_normalize(Tensor images, float[] mean, float[] std, ScalarType dtype) -> Tensor");

  m.def(
      "contrastive(Tensor rows, Tensor columns, Tensor scale, int first_column=0, "
      "Tensor? row_ids=None, Tensor? column_ids=None, bool with_sums=False) -> "
      "(Tensor row_lse, Tensor column_lse, Tensor positive, Tensor row_sum, Tensor column_sum)");
  m.def(
      "contrastive_backward(Tensor rows, Tensor columns, Tensor scale, int first_column, "
      "Tensor? row_ids, Tensor? column_ids, Tensor row_lse, Tensor column_lse, "
      "Tensor row_lse_grad, Tensor column_lse_grad, Tensor positive_grad, Tensor? row_sum_grad, "
      "Tensor? column_sum_grad) -> (Tensor rows_grad, Tensor columns_grad, Tensor scale_grad)");
  m.def(
      "contrastive_sigmoid(Tensor rows, Tensor columns, Tensor scale, Tensor bias, "
      "int first_column=0, Tensor? row_ids=None, Tensor? column_ids=None) -> Tensor");
  m.def(
      "contrastive_sigmoid_backward(Tensor rows, Tensor columns, Tensor scale, Tensor bias, "
      "int first_column, Tensor? row_ids, Tensor? column_ids, Tensor row_loss_grad) -> "
      "(Tensor rows_grad, Tensor columns_grad, Tensor scale_grad, Tensor bias_grad)");
  m.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal=False, Tensor? prefix_lengths=None, "
      "float? scale=None) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, bool causal=False, Tensor? prefix_lengths=None, float? scale=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "fp8_cast(Tensor x, str granularity, ScalarType dtype, Tensor? scale=None, *, "
      "bool column=False, bool power_of_two=False, bool check_finite=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_topk(Tensor logits, int k, str score=\"softmax\", bool renormalize=True, "
      "float scale=1.0, Tensor? selection_bias=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_topk_backward(Tensor grad_weights, Tensor grad_mean_scores, Tensor grad_z_loss, "
      "Tensor logits, Tensor indices, str score, bool renormalize, float scale) -> Tensor");
  m.def(
      "moe_plan(Tensor indices, int num_experts, int alignment=16, int? capacity=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("moe_permute(Tensor x, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def("moe_permute_backward(Tensor grad, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def(
      "moe_unpermute(Tensor rows, Tensor weights, Tensor row_to_slot, Tensor slot_to_row) "
      "-> Tensor");
  m.def(
      "moe_unpermute_backward(Tensor grad, Tensor rows, Tensor weights, Tensor row_to_slot, "
      "Tensor slot_to_row) -> (Tensor, Tensor)");
  m.def("grouped_mm(Tensor x, Tensor weights, Tensor offsets) -> Tensor");
  m.def(
      "grouped_mm_backward(Tensor grad, Tensor x, Tensor weights, Tensor offsets) "
      "-> (Tensor, Tensor)");
  m.def(
      "gather_grouped_mm(Tensor x, Tensor weights, Tensor offsets, Tensor row_to_slot, "
      "Tensor slot_to_row) -> Tensor");
  m.def(
      "gather_grouped_mm_backward(Tensor grad, Tensor x, Tensor weights, Tensor offsets, "
      "Tensor row_to_slot, Tensor slot_to_row) -> (Tensor, Tensor)");
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
