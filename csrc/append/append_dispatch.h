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
  // Many rows: 8 per group of lanes, so that parameters cost little. Few: one, so that every SM has some.
  const int64_t rows = p.num_tokens * p.num_kv_heads;
  const int rounds = rows >= int64_t{kAppendRows} * kManyRowBlocks ? kLanesPerRow : 1;
  const int blocks = 2 * row_blocks(p.num_tokens, p.num_kv_heads, rounds * kAppendRows, op);
  dispatch_head_dim(p.head_dim, op, [&](auto head_dim) {
    dispatch_dtype(p.dtype, [&](auto dtype) {
      launch("saw_int4_append_kernel", saw_int4_append_kernel<head_dim(), dtype()>, blocks, kAppendThreads, 0, stream,
             p, rounds);
    });
  });
}

}  // namespace saw_int4
