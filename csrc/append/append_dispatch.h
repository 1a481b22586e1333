// From AppendParams to one kernel launch.
#pragma once

#include "append/append_kernel.cuh"
#include "common/dispatch.h"
#include "common/launch.h"

namespace saw_int4 {

inline void append(const AppendParams& p, Stream stream) {
  const char* op = "append_kv";
  if (p.num_tokens == 0) return;
  check_row_alignment(p.k, p.k_token_stride, p.dtype, op, "k");
  check_row_alignment(p.v, p.v_token_stride, p.dtype, op, "v");
  const int blocks = 2 * row_blocks(p.num_tokens, p.num_kv_heads, kAppendRows, op);
  dispatch_head_dim(p.head_dim, op, [&](auto head_dim) {
    dispatch_dtype(p.dtype, [&](auto dtype) {
      launch("saw_int4_append_kernel", saw_int4_append_kernel<head_dim(), dtype()>, blocks, kAppendThreads, 0, stream,
             p);
    });
  });
}

}  // namespace saw_int4
