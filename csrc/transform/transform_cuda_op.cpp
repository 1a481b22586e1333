// transform_rows on CUDA.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "transform/transform_cuda.h"

namespace saw_int4 {
namespace {

void transform_rows_op(const at::Tensor& x, const at::Tensor& out, int64_t rotation_order, const OptionalTensor& mean,
                       const OptionalTensor& mul, const OptionalTensor& sign) {
  const auto p = transform_rows_params(x, out, rotation_order, mean, mul, sign);
  const c10::cuda::CUDAGuard guard(x.device());
  transform_rows_on_cuda(p, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CUDA, m) {
  m.impl("transform_rows", &transform_rows_op);
}

}  // namespace saw_int4
