// What Python asks about decode on a CUDA device.
#pragma once

#include <cstdint>

namespace saw_int4 {

// Bytes of workspace for calls of up to num_query_rows query rows on a CUDA device.
int64_t decode_workspace_bytes_on(int device, int64_t num_query_rows, int num_q_heads, int head_dim,
                                  bool batch_invariant);

}  // namespace saw_int4
