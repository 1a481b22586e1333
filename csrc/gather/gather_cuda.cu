#include "gather/gather_cuda.h"
#include "gather/gather_dispatch.h"

namespace saw_int4 {

void gather_on_cuda(const GatherParams& p, cudaStream_t stream) {
  gather(p, stream);
}

}  // namespace saw_int4
