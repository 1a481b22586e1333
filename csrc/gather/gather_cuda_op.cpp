// gather_kv on CUDA.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "gather/gather_cuda.h"

namespace saw_int4 {
namespace {

void gather_kv(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& slots, const at::Tensor& k_out,
               const at::Tensor& v_out) {
  const auto p = gather_params(k_cache, v_cache, slots, k_out, v_out);
  const c10::cuda::CUDAGuard guard(k_out.device());
  gather_on_cuda(p, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("gather_kv", &gather_kv);
}

}  // namespace saw_int4
