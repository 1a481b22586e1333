// Arguments of the operators, from torch tensors to the plain structs of params.h. Everything that the shapes,
// dtypes, strides and devices can tell is checked here, before anything is written; values (slots, lengths) are
// checked by the CPU operators, and on a GPU inside the kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "format.h"
#include "params.h"

namespace saw_int4 {

using OptionalTensor = std::optional<at::Tensor>;

// An operator as it is registered: run(p, arguments...) for the p that `params`, one of the functions below, makes of
// its arguments. So only that function and the schema (ops.cpp) list them.
template <typename Params, typename... Args, typename Run>
auto operator_of(Params (*params)(Args...), Run run) {
  return [=](Args... arguments) { run(params(arguments...), arguments...); };
}

inline DType dtype_of(const at::Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kFloat:
      return DType::kFloat32;
    default:
      TORCH_CHECK(false, op, ": ", name, " is ", t.scalar_type(), ", expected bfloat16, float16 or float32");
  }
}

inline void check_dtype(const at::Tensor& t, at::ScalarType expected, const char* op, const char* name) {
  TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " is ", t.scalar_type(), ", expected ", expected);
}

inline void check_device(const at::Tensor& t, const at::Tensor& like, const char* op, const char* name) {
  TORCH_CHECK(t.device() == like.device(), op, ": ", name, " is on ", t.device(), ", the other tensors on ",
              like.device(), "; move it there");
}

inline void check_contiguous(const at::Tensor& t, const char* op, const char* name) {
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " has strides ", t.strides(), " for shape ", t.sizes(),
              ", expected a contiguous tensor; call .contiguous()");
}

inline void check_shape(const at::Tensor& t, at::IntArrayRef expected, const char* op, const char* name,
                        const char* letters) {
  TORCH_CHECK(t.sizes() == expected, op, ": ", name, " has shape ", t.sizes(), ", expected ", letters, " = ", expected);
}

// [T, H, D] with whole rows contiguous and any stride between tokens.
inline void check_rows(const at::Tensor& t, const char* op, const char* name) {
  TORCH_CHECK(t.dim() == 3, op, ": ", name, " has shape ", t.sizes(), ", expected three dimensions [T, H, D]");
  TORCH_CHECK(t.size(2) > 0 && t.size(2) % 16 == 0 && t.size(2) <= 4096, op, ": ", name, " has head_dim ", t.size(2),
              ", expected a positive multiple of 16, at most 4096");
  TORCH_CHECK(t.size(1) > 0 && t.size(1) <= std::numeric_limits<int32_t>::max(), op, ": ", name, " has ", t.size(1),
              " heads, expected at least one");
  const bool heads_contiguous = t.size(1) == 1 || t.stride(1) == t.size(2);
  TORCH_CHECK(t.numel() == 0 || (t.stride(2) == 1 && heads_contiguous), op, ": ", name, " has strides ", t.strides(),
              " for shape ", t.sizes(), ", expected the last two dimensions contiguous; call .contiguous()");
}

// Returns the groups of its rows.
inline int check_cache(const at::Tensor& t, int64_t head_dim, const at::Tensor& like, const char* op,
                       const char* name) {
  check_device(t, like, op, name);
  check_dtype(t, at::kByte, op, name);
  const int groups = t.dim() == 3 ? groups_of_row(t.size(2), static_cast<int>(head_dim)) : 0;
  TORCH_CHECK(groups > 0, op, ": ", name, " has shape ", t.sizes(),
              ", expected [num_slots, H_kv, row_bytes] with rows of ", row_bytes(head_dim, 1), " bytes (one group) or ",
              row_bytes(head_dim, 2), " (two) for head_dim ", head_dim, "; was the cache made for another head_dim?");
  check_contiguous(t, op, name);
  return groups;
}

// Caches of the heads of `rows`, [T, H_kv, D]. Returns the groups of their rows.
inline int check_caches(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& rows, const char* op) {
  const int groups = check_cache(k_cache, rows.size(2), rows, op, "k_cache");
  check_cache(v_cache, rows.size(2), rows, op, "v_cache");
  check_shape(k_cache, {k_cache.size(0), rows.size(1), k_cache.size(2)}, op, "k_cache", "[num_slots, H_kv, row_bytes]");
  check_shape(v_cache, k_cache.sizes(), op, "v_cache", "the shape of k_cache");
  return groups;
}

// One for each token of `rows`.
inline void check_slots(const at::Tensor& slots, at::ScalarType type, const at::Tensor& rows, const char* op,
                        const char* letters) {
  check_device(slots, rows, op, "slots");
  check_dtype(slots, type, op, "slots");
  check_shape(slots, {rows.size(0)}, op, "slots", letters);
  check_contiguous(slots, op, "slots");
}

inline void check_rotation_order(int64_t order, int64_t head_dim, const char* op) {
  const bool power_of_two = order >= 1 && (order & (order - 1)) == 0;
  TORCH_CHECK(power_of_two && head_dim % order == 0, op, ": rotation_order is ", order,
              ", expected 1 (no rotation) or a power of two that divides head_dim ", head_dim);
}

// A calibrated vector per KV head: fp32 [H_kv, D], or null.
inline const float* vector_or_null(const OptionalTensor& t, int64_t num_kv_heads, int64_t head_dim,
                                   const at::Tensor& like, const char* op, const char* name) {
  if (!t.has_value()) return nullptr;
  check_device(*t, like, op, name);
  check_dtype(*t, at::kFloat, op, name);
  check_shape(*t, {num_kv_heads, head_dim}, op, name, "[H_kv, D]");
  check_contiguous(*t, op, name);
  return t->const_data_ptr<float>();
}

inline AppendParams append_params(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache,
                                  const at::Tensor& v_cache, const at::Tensor& slots, int64_t rotation_order,
                                  bool rotate_v, const OptionalTensor& k_mean, const OptionalTensor& k_inv_scale,
                                  const OptionalTensor& k_sign) {
  const char* op = "append_kv";
  check_rows(k, op, "k");
  check_rows(v, op, "v");
  check_device(v, k, op, "v");
  const DType dtype = dtype_of(k, op, "k");
  check_dtype(v, k.scalar_type(), op, "v");
  check_shape(v, k.sizes(), op, "v", "the shape of k");
  const int64_t heads = k.size(1), head_dim = k.size(2);
  const int groups = check_caches(k_cache, v_cache, k, op);
  check_slots(slots, at::kLong, k, op, "[T]");
  check_rotation_order(rotation_order, head_dim, op);
  TORCH_CHECK(k_mean.has_value() == k_inv_scale.has_value() && k_mean.has_value() == k_sign.has_value(), op,
              ": one of k_mean, k_inv_scale and k_sign is missing, expected all (calibrated) or none");
  AppendParams p;
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_token_stride = k.stride(0);
  p.v_token_stride = v.stride(0);
  p.dtype = dtype;
  p.k_cache = k_cache.mutable_data_ptr<uint8_t>();
  p.v_cache = v_cache.mutable_data_ptr<uint8_t>();
  p.num_slots = k_cache.size(0);
  p.slots = slots.const_data_ptr<int64_t>();
  p.num_tokens = k.size(0);
  p.num_kv_heads = static_cast<int>(heads);
  p.head_dim = static_cast<int>(head_dim);
  p.groups = groups;
  p.transform.rotation_order = static_cast<int>(rotation_order);
  p.transform.rotate_v = rotate_v;
  p.transform.k_mean = vector_or_null(k_mean, heads, head_dim, k, op, "k_mean");
  p.transform.k_inv_scale = vector_or_null(k_inv_scale, heads, head_dim, k, op, "k_inv_scale");
  p.transform.k_sign = vector_or_null(k_sign, heads, head_dim, k, op, "k_sign");
  return p;
}

inline DecodeParams decode_params(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                  const at::Tensor& slot_table, const at::Tensor& table_rows,
                                  const at::Tensor& seq_lens, const OptionalTensor& q_indptr, const at::Tensor& out,
                                  const OptionalTensor& lse, const OptionalTensor& workspace, int64_t max_q_len,
                                  int64_t page_size, double sm_scale, int64_t rotation_order, bool rotate_v,
                                  const OptionalTensor& k_mean, const OptionalTensor& k_scale,
                                  const OptionalTensor& k_sign, double logit_cap, int64_t window,
                                  const OptionalTensor& sinks, const OptionalTensor& tree_mask, bool batch_invariant) {
  const char* op = "decode_attention";
  check_rows(q, op, "q");
  const DType dtype = dtype_of(q, op, "q");
  const int64_t rows = q.size(0), q_heads = q.size(1), head_dim = q.size(2);
  const int groups = check_cache(k_cache, head_dim, q, op, "k_cache");
  check_cache(v_cache, head_dim, q, op, "v_cache");
  check_shape(v_cache, k_cache.sizes(), op, "v_cache", "the shape of k_cache");
  const int64_t kv_heads = k_cache.size(1);
  TORCH_CHECK(kv_heads > 0 && q_heads % kv_heads == 0, op, ": q has ", q_heads, " heads and k_cache ", kv_heads,
              ", expected a multiple of the KV heads");
  check_device(slot_table, q, op, "slot_table");
  check_dtype(slot_table, at::kInt, op, "slot_table");
  TORCH_CHECK(slot_table.dim() == 2 && (slot_table.numel() == 0 || slot_table.stride(1) == 1), op,
              ": slot_table has shape ", slot_table.sizes(), " and strides ", slot_table.strides(),
              ", expected [rows, max_len] with contiguous rows");
  check_device(table_rows, q, op, "table_rows");
  check_dtype(table_rows, at::kLong, op, "table_rows");
  TORCH_CHECK(table_rows.dim() == 1, op, ": table_rows has shape ", table_rows.sizes(), ", expected [B]");
  check_contiguous(table_rows, op, "table_rows");
  const int64_t requests = table_rows.size(0);
  check_device(seq_lens, q, op, "seq_lens");
  check_dtype(seq_lens, at::kLong, op, "seq_lens");
  check_shape(seq_lens, {requests}, op, "seq_lens", "[B]");
  check_contiguous(seq_lens, op, "seq_lens");
  TORCH_CHECK(max_q_len >= 1 && max_q_len <= std::numeric_limits<int32_t>::max(), op, ": max_q_len is ", max_q_len,
              ", expected at least 1");
  if (q_indptr.has_value()) {
    check_device(*q_indptr, q, op, "q_indptr");
    check_dtype(*q_indptr, at::kInt, op, "q_indptr");
    check_shape(*q_indptr, {requests + 1}, op, "q_indptr", "[B + 1]");
    check_contiguous(*q_indptr, op, "q_indptr");
  } else {
    TORCH_CHECK(rows == requests * max_q_len, op, ": q has ", rows, " rows, expected max_q_len ", max_q_len,
                " for each of the ", requests, " requests; give q_indptr when they differ");
  }
  check_device(out, q, op, "out");
  check_dtype(out, q.scalar_type(), op, "out");
  check_shape(out, q.sizes(), op, "out", "the shape of q");
  check_contiguous(out, op, "out");
  if (lse.has_value()) {
    check_device(*lse, q, op, "lse");
    check_dtype(*lse, at::kFloat, op, "lse");
    check_shape(*lse, {rows, q_heads}, op, "lse", "[T_q, H_q]");
    check_contiguous(*lse, op, "lse");
  }
  TORCH_CHECK(page_size >= 1 && page_size <= std::numeric_limits<int32_t>::max(), op, ": page_size is ", page_size,
              ", expected at least 1");
  TORCH_CHECK(std::isfinite(sm_scale), op, ": sm_scale is ", sm_scale, ", expected a finite number");
  TORCH_CHECK(logit_cap >= 0.0 && std::isfinite(logit_cap), op, ": logit_cap is ", logit_cap,
              ", expected 0 (none) or a positive number");
  TORCH_CHECK(window >= -1, op, ": window is ", window, ", expected -1 (none) or the tokens seen before the row");
  check_rotation_order(rotation_order, head_dim, op);
  TORCH_CHECK(k_mean.has_value() == k_scale.has_value() && k_mean.has_value() == k_sign.has_value(), op,
              ": one of k_mean, k_scale and k_sign is missing, expected all (calibrated) or none");
  if (sinks.has_value()) {
    check_device(*sinks, q, op, "sinks");
    check_dtype(*sinks, at::kFloat, op, "sinks");
    check_shape(*sinks, {q_heads}, op, "sinks", "[H_q]");
    check_contiguous(*sinks, op, "sinks");
  }
  if (tree_mask.has_value()) {
    check_device(*tree_mask, q, op, "tree_mask");
    check_dtype(*tree_mask, at::kLong, op, "tree_mask");
    check_shape(*tree_mask, {rows}, op, "tree_mask", "[T_q]");
    check_contiguous(*tree_mask, op, "tree_mask");
    TORCH_CHECK(max_q_len <= 64, op, ": max_q_len is ", max_q_len,
                " with a tree_mask of 64 bits, expected at most 64 new tokens per request");
  }
  if (workspace.has_value()) {
    check_device(*workspace, q, op, "workspace");
    check_dtype(*workspace, at::kByte, op, "workspace");
    check_contiguous(*workspace, op, "workspace");
  }
  DecodeParams p;
  p.q = q.const_data_ptr();
  p.q_token_stride = q.stride(0);
  p.dtype = dtype;
  p.out = out.mutable_data_ptr();
  p.lse = lse.has_value() ? lse->mutable_data_ptr<float>() : nullptr;
  p.k_cache = k_cache.const_data_ptr<uint8_t>();
  p.v_cache = v_cache.const_data_ptr<uint8_t>();
  p.num_slots = k_cache.size(0);
  p.slot_table = slot_table.const_data_ptr<int32_t>();
  p.table_stride = slot_table.stride(0);
  p.table_rows = table_rows.const_data_ptr<int64_t>();
  p.seq_lens = seq_lens.const_data_ptr<int64_t>();
  p.q_indptr = q_indptr.has_value() ? q_indptr->const_data_ptr<int32_t>() : nullptr;
  p.num_query_rows = rows;
  p.num_requests = static_cast<int>(requests);
  p.max_q_len = static_cast<int>(max_q_len);
  p.page_size = static_cast<int>(page_size);
  p.num_q_heads = static_cast<int>(q_heads);
  p.num_kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(head_dim);
  p.groups = groups;
  p.transform.rotation_order = static_cast<int>(rotation_order);
  p.transform.rotate_v = rotate_v;
  p.transform.k_mean = vector_or_null(k_mean, kv_heads, head_dim, q, op, "k_mean");
  p.transform.k_scale = vector_or_null(k_scale, kv_heads, head_dim, q, op, "k_scale");
  p.transform.k_sign = vector_or_null(k_sign, kv_heads, head_dim, q, op, "k_sign");
  p.sm_scale = static_cast<float>(sm_scale);
  p.logit_cap = static_cast<float>(logit_cap);
  p.window = window;
  p.sinks = sinks.has_value() ? sinks->const_data_ptr<float>() : nullptr;
  p.tree_mask = tree_mask.has_value() ? tree_mask->const_data_ptr<int64_t>() : nullptr;
  p.workspace = workspace.has_value() ? workspace->mutable_data_ptr() : nullptr;
  p.workspace_bytes = workspace.has_value() ? workspace->numel() : 0;
  p.batch_invariant = batch_invariant;
  return p;
}

inline GatherParams gather_params(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& slots,
                                  const at::Tensor& k_out, const at::Tensor& v_out) {
  const char* op = "gather_kv";
  check_rows(k_out, op, "k_out");
  const DType dtype = dtype_of(k_out, op, "k_out");
  check_contiguous(k_out, op, "k_out");
  check_device(v_out, k_out, op, "v_out");
  check_dtype(v_out, k_out.scalar_type(), op, "v_out");
  check_shape(v_out, k_out.sizes(), op, "v_out", "the shape of k_out");
  check_contiguous(v_out, op, "v_out");
  const int64_t heads = k_out.size(1), head_dim = k_out.size(2);
  const int groups = check_caches(k_cache, v_cache, k_out, op);
  check_slots(slots, at::kInt, k_out, op, "[N]");
  GatherParams p;
  p.k_cache = k_cache.const_data_ptr<uint8_t>();
  p.v_cache = v_cache.const_data_ptr<uint8_t>();
  p.num_slots = k_cache.size(0);
  p.slots = slots.const_data_ptr<int32_t>();
  p.num_tokens = k_out.size(0);
  p.k_out = k_out.mutable_data_ptr();
  p.v_out = v_out.mutable_data_ptr();
  p.dtype = dtype;
  p.num_kv_heads = static_cast<int>(heads);
  p.head_dim = static_cast<int>(head_dim);
  p.groups = groups;
  return p;
}

inline TransformRowsParams transform_rows_params(const at::Tensor& x, const at::Tensor& out, int64_t rotation_order,
                                                 const OptionalTensor& mean, const OptionalTensor& mul,
                                                 const OptionalTensor& sign) {
  const char* op = "transform_rows";
  check_rows(x, op, "x");
  const DType dtype = dtype_of(x, op, "x");
  check_device(out, x, op, "out");
  check_dtype(out, x.scalar_type(), op, "out");
  check_shape(out, x.sizes(), op, "out", "the shape of x");
  check_contiguous(out, op, "out");
  const int64_t heads = x.size(1), head_dim = x.size(2);
  check_rotation_order(rotation_order, head_dim, op);
  const OptionalTensor& any = mean.has_value() ? mean : mul.has_value() ? mul : sign;
  int64_t kv_heads = heads;
  if (any.has_value()) {
    kv_heads = any->dim() == 2 ? any->size(0) : 0;
    TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, op, ": mean, mul or sign has shape ", any->sizes(),
                ", expected [H_kv, D] where H_kv divides the ", heads, " heads of x");
  }
  TransformRowsParams p;
  p.x = x.const_data_ptr();
  p.x_token_stride = x.stride(0);
  p.y = out.mutable_data_ptr();
  p.dtype = dtype;
  p.num_tokens = x.size(0);
  p.num_heads = static_cast<int>(heads);
  p.num_kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(head_dim);
  p.rotation_order = static_cast<int>(rotation_order);
  p.mean = vector_or_null(mean, kv_heads, head_dim, x, op, "mean");
  p.mul = vector_or_null(mul, kv_heads, head_dim, x, op, "mul");
  p.sign = vector_or_null(sign, kv_heads, head_dim, x, op, "sign");
  return p;
}

}  // namespace saw_int4
