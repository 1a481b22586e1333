// The emulated operators as Python functions on CPU tensors: checked as the real ones are, with every tensor
// registered as memory that the kernels may read, write, or both.
#include "emulator/library.h"

#include <torch/extension.h>

#include "checks.h"
#include "decode/config.h"
#include "emulator/bind.h"

namespace saw_int4::emulator {
namespace {

void add(std::vector<Range>& ranges, const char* name, const at::Tensor& t, Access access) {
  ranges.push_back({name, t.const_data_ptr(), t.numel() * t.element_size(), access});
}

void add(std::vector<Range>& ranges, const char* name, const OptionalTensor& t, Access access) {
  if (t.has_value()) add(ranges, name, *t, access);
}

// [T, ...] with a stride between tokens: what lies between the rows is none of the kernel's business.
void add_rows(std::vector<Range>& ranges, const char* name, const at::Tensor& t, Access access) {
  if (t.is_contiguous()) return add(ranges, name, t, access);
  for (int64_t i = 0; i < t.size(0); ++i) add(ranges, name, t[i], access);
}

void append_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
               const at::Tensor& slots, int64_t rotation_order, bool rotate_v, const OptionalTensor& k_mean,
               const OptionalTensor& k_inv_scale, const OptionalTensor& k_sign) {
  const AppendParams p =
      append_params(k, v, k_cache, v_cache, slots, rotation_order, rotate_v, k_mean, k_inv_scale, k_sign);
  std::vector<Range> ranges;
  add_rows(ranges, "k", k, Access::kRead);
  add_rows(ranges, "v", v, Access::kRead);
  add(ranges, "k_cache", k_cache, Access::kWrite);
  add(ranges, "v_cache", v_cache, Access::kWrite);
  add(ranges, "slots", slots, Access::kRead);
  add(ranges, "k_mean", k_mean, Access::kRead);
  add(ranges, "k_inv_scale", k_inv_scale, Access::kRead);
  add(ranges, "k_sign", k_sign, Access::kRead);
  const Registered registered(ranges);
  append(p);
}

void decode_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                      const at::Tensor& slot_table, const at::Tensor& table_rows, const at::Tensor& seq_lens,
                      const OptionalTensor& q_indptr, const at::Tensor& out, const OptionalTensor& lse,
                      const OptionalTensor& workspace, int64_t max_q_len, int64_t page_size, double sm_scale,
                      int64_t rotation_order, bool rotate_v, const OptionalTensor& k_mean,
                      const OptionalTensor& k_scale, const OptionalTensor& k_sign, double logit_cap, int64_t window,
                      const OptionalTensor& sinks, const OptionalTensor& tree_mask, bool batch_invariant) {
  const DecodeParams p = decode_params(q, k_cache, v_cache, slot_table, table_rows, seq_lens, q_indptr, out, lse,
                                       workspace, max_q_len, page_size, sm_scale, rotation_order, rotate_v, k_mean,
                                       k_scale, k_sign, logit_cap, window, sinks, tree_mask, batch_invariant);
  std::vector<Range> ranges;
  add_rows(ranges, "q", q, Access::kRead);
  add(ranges, "k_cache", k_cache, Access::kRead);
  add(ranges, "v_cache", v_cache, Access::kRead);
  add_rows(ranges, "slot_table", slot_table, Access::kRead);
  add(ranges, "table_rows", table_rows, Access::kRead);
  add(ranges, "seq_lens", seq_lens, Access::kRead);
  add(ranges, "q_indptr", q_indptr, Access::kRead);
  add(ranges, "out", out, Access::kWrite);
  add(ranges, "lse", lse, Access::kWrite);
  add(ranges, "workspace", workspace, Access::kScratch);
  add(ranges, "k_mean", k_mean, Access::kRead);
  add(ranges, "k_scale", k_scale, Access::kRead);
  add(ranges, "k_sign", k_sign, Access::kRead);
  add(ranges, "sinks", sinks, Access::kRead);
  add(ranges, "tree_mask", tree_mask, Access::kRead);
  const Registered registered(ranges);
  decode(p);
}

void gather_kv(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& slots, const at::Tensor& k_out,
               const at::Tensor& v_out) {
  const GatherParams p = gather_params(k_cache, v_cache, slots, k_out, v_out);
  std::vector<Range> ranges;
  add(ranges, "k_cache", k_cache, Access::kRead);
  add(ranges, "v_cache", v_cache, Access::kRead);
  add(ranges, "slots", slots, Access::kRead);
  add(ranges, "k_out", k_out, Access::kWrite);
  add(ranges, "v_out", v_out, Access::kWrite);
  const Registered registered(ranges);
  gather(p);
}

void transform_rows_op(const at::Tensor& x, const at::Tensor& out, int64_t rotation_order, const OptionalTensor& mean,
                       const OptionalTensor& mul, const OptionalTensor& sign) {
  const TransformRowsParams p = transform_rows_params(x, out, rotation_order, mean, mul, sign);
  std::vector<Range> ranges;
  add_rows(ranges, "x", x, Access::kRead);
  add(ranges, "out", out, Access::kWrite);
  add(ranges, "mean", mean, Access::kRead);
  add(ranges, "mul", mul, Access::kRead);
  add(ranges, "sign", sign, Access::kRead);
  const Registered registered(ranges);
  transform_rows(p);
}

}  // namespace
}  // namespace saw_int4::emulator

PYBIND11_MODULE(SAW_INT4_MODULE, m) {
  using namespace saw_int4::emulator;
  bind_machine(m);
  m.def("append_kv", &append_kv);
  m.def("decode_attention", &decode_attention);
  m.def("decode_workspace_bytes", [](int64_t num_query_rows, int num_q_heads, int head_dim, bool batch_invariant) {
    return saw_int4::decode_workspace_bytes(machine().options().sm_count, num_query_rows, num_q_heads, head_dim,
                                            batch_invariant);
  });
  m.def("gather_kv", &gather_kv);
  m.def("transform_rows", &transform_rows_op);
}
