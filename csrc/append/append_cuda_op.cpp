// append_kv on CUDA.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "append/append_cuda.h"
#include "checks.h"
#include "common/launch.h"

namespace saw_int4 {
namespace {

void append_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
               const at::Tensor& slots, int64_t rotation_order, bool rotate_v, const OptionalTensor& k_mean,
               const OptionalTensor& k_inv_scale, const OptionalTensor& k_sign) {
  const auto p = append_params(k, v, k_cache, v_cache, slots, rotation_order, rotate_v, k_mean, k_inv_scale, k_sign);
  const c10::cuda::CUDAGuard guard(k.device());
  append_on_cuda(p, device_limits(k.device().index()), c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("append_kv", &append_kv);
}

}  // namespace saw_int4
