// From TransformRowsParams to one kernel launch.
#pragma once

#include "common/dispatch.h"
#include "common/launch.h"
#include "transform/transform_kernel.cuh"

namespace saw_int4 {

inline void transform_rows(const TransformRowsParams& p, Stream stream) {
  const char* op = "transform_rows";
  if (p.num_tokens == 0) return;
  check_row_alignment(p.x, p.x_token_stride, p.dtype, op, "x");
  check_row_alignment(p.y, 0, p.dtype, op, "out");
  dispatch_head_dim(p.head_dim, op, [&](auto head_dim) {
    const int blocks = row_blocks(p.num_tokens, p.num_heads, kTransformRows<head_dim()>, op);
    dispatch_dtype(p.dtype, [&](auto dtype) {
      launch("saw_int4_transform_kernel", saw_int4_transform_kernel<head_dim(), dtype()>, blocks, kTransformThreads, 0,
             stream, p);
    });
  });
}

}  // namespace saw_int4
