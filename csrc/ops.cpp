// Operator schemas: the contract between kernels and Python. Implementations register themselves per device
// (csrc/<op>/<op>_cpu.cpp, <op>_cuda.cu); fakes and docstrings live in saw_int4/ops.py.
#include <torch/library.h>

TORCH_LIBRARY(saw_int4, m) {
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, *, "
      "int rotation_order, bool rotate_v, Tensor? k_mean=None, Tensor? k_inv_scale=None, Tensor? k_sign=None) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot_table, Tensor table_rows, "
      "Tensor seq_lens, Tensor? q_indptr, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? workspace, *, "
      "int max_q_len, int page_size, float sm_scale, int rotation_order, bool rotate_v, "
      "Tensor? k_mean=None, Tensor? k_scale=None, Tensor? k_sign=None, float logit_cap=0.0, int window=-1, "
      "Tensor? sinks=None, Tensor? tree_mask=None, bool batch_invariant=False) -> ()");
  m.def("gather_kv(Tensor k_cache, Tensor v_cache, Tensor slots, Tensor(a!) k_out, Tensor(b!) v_out) -> ()");
  m.def(
      "transform_rows(Tensor x, Tensor(a!) out, *, int rotation_order, Tensor? mean=None, Tensor? mul=None, "
      "Tensor? sign=None) -> ()");
}
