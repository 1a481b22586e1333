// From GatherParams to one kernel launch.
#pragma once

#include "common/dispatch.h"
#include "common/launch.h"
#include "gather/gather_kernel.cuh"

namespace saw_int4 {

inline void gather(const GatherParams& p, Stream stream) {
  const char* op = "gather_kv";
  if (p.num_tokens == 0) return;
  check_row_alignment(p.k_out, 0, p.dtype, op, "k_out");
  check_row_alignment(p.v_out, 0, p.dtype, op, "v_out");
  dispatch_head_dim(p.head_dim, op, [&](auto head_dim) {
    const int blocks = row_blocks(p.num_tokens, p.num_kv_heads, kGatherRows<head_dim()>, op);
    dispatch_dtype(p.dtype, [&](auto dtype) {
      dispatch_groups(p.groups, op, [&](auto groups) {
        launch("saw_int4_gather_kernel", saw_int4_gather_kernel<head_dim(), dtype(), groups()>, blocks, kGatherThreads,
               0, stream, p);
      });
    });
  });
}

}  // namespace saw_int4
