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

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("decode_attention", operator_of(decode_params, [](const DecodeParams& p, const at::Tensor& q, const auto&...) {
           const c10::cuda::CUDAGuard guard(q.device());
           decode(p, device_limits(q.device().index()), c10::cuda::getCurrentCUDAStream());
         }));
}

}  // namespace saw_int4
