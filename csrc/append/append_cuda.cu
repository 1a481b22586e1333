#include "append/append_cuda.h"
#include "append/append_dispatch.h"

namespace saw_int4 {

void append_on_cuda(const AppendParams& p, const DeviceLimits& limits, cudaStream_t stream) {
  append(p, limits, stream);
}

}  // namespace saw_int4
