// The launch of append's kernel, for callers that are not compiled by nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include "common/device_limits.h"
#include "params.h"

namespace saw_int4 {

void append_on_cuda(const AppendParams& p, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace saw_int4
