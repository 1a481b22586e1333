#include "append/append_cuda.h"
#include "append/append_dispatch.h"

namespace saw_int4 {

void append_on_cuda(const AppendParams& p, cudaStream_t stream) {
  append(p, stream);
}

}  // namespace saw_int4
