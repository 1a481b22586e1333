// append_kv on CUDA.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "append/append_cuda.h"
#include "checks.h"
#include "common/launch.h"

namespace saw_int4 {

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("append_kv", operator_of(append_params, [](const AppendParams& p, const at::Tensor& k, const auto&...) {
           const c10::cuda::CUDAGuard guard(k.device());
           append_on_cuda(p, device_limits(k.device().index()), c10::cuda::getCurrentCUDAStream());
         }));
}

}  // namespace saw_int4
