// gather_kv on CUDA.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "gather/gather_cuda.h"

namespace saw_int4 {

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("gather_kv", operator_of(gather_params, [](const GatherParams& p, const at::Tensor& k_cache, const auto&...) {
           const c10::cuda::CUDAGuard guard(k_cache.device());
           gather_on_cuda(p, c10::cuda::getCurrentCUDAStream());
         }));
}

}  // namespace saw_int4
