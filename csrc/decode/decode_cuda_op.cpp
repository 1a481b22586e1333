// decode_attention on CUDA.
#include "decode/decode_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "decode/decode_dispatch.h"

namespace saw_int4 {

int64_t decode_workspace_bytes_on(int device, int64_t num_query_rows, int num_q_heads, int head_dim,
                                  bool batch_invariant) {
  return decode_workspace_bytes(device_limits(device).sm_count, num_query_rows, num_q_heads, head_dim, batch_invariant);
}

namespace {

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
  const c10::cuda::CUDAGuard guard(q.device());
  decode(p, device_limits(q.device().index()), c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("decode_attention", &decode_attention);
}

}  // namespace saw_int4
