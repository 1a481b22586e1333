// From AppendParams to one kernel launch.
#pragma once

#include <algorithm>

#include "append/append_kernel.cuh"
#include "common/dispatch.h"
#include "common/launch.h"

namespace saw_int4 {

inline void append(const AppendParams& p, const DeviceLimits& limits, Stream stream) {
  const char* op = "append_kv";
  if (p.num_tokens == 0) return;
  check_row_alignment(p.k, p.k_token_stride, p.dtype, op, "k");
  check_row_alignment(p.v, p.v_token_stride, p.dtype, op, "v");
  const int64_t pairs = p.num_tokens * p.num_kv_heads;
  dispatch_head_dim(p.head_dim, op, [&](auto head_dim) {
    dispatch_dtype(p.dtype, [&](auto dtype) {
      constexpr int kRows = kAppendRows<head_dim()>;
      const int64_t most = pairs / (int64_t{kRows} * limits.sm_count * kAppendBlocksOfTensorPerSm);
      const int rounds = static_cast<int>(std::clamp<int64_t>(most, 1, kAppendRounds));
      const int blocks = 2 * row_blocks(p.num_tokens, p.num_kv_heads, rounds * kRows, op);
      dispatch_groups(p.groups, op, [&](auto groups) {
        launch("saw_int4_append_kernel", saw_int4_append_kernel<head_dim(), dtype(), groups()>, blocks, kAppendThreads,
               AppendInput<head_dim(), dtype()>::kSharedBytes, stream, p, rounds);
      });
    });
  });
}

}  // namespace saw_int4
