// transform_rows on CUDA.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "transform/transform_cuda.h"

namespace saw_int4 {

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("transform_rows",
         operator_of(transform_rows_params, [](const TransformRowsParams& p, const at::Tensor& x, const auto&...) {
           const c10::cuda::CUDAGuard guard(x.device());
           transform_rows_on_cuda(p, c10::cuda::getCurrentCUDAStream());
         }));
}

}  // namespace saw_int4
