// The launch of transform's kernel, for callers that are not compiled by nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace saw_int4 {

void transform_rows_on_cuda(const TransformRowsParams& p, cudaStream_t stream);

}  // namespace saw_int4
