// From AppendParams to one kernel launch.
#pragma once

#include <algorithm>

#include "append/append_kernel.cuh"
#include "common/dispatch.h"
#include "common/launch.h"

namespace saw_int4 {

// Of blocks that do `rows` rows at a time, of at most so many heads; at_once: whether most_blocks run at a time.
inline AppendPlan append_plan(int64_t tokens, int num_heads, int rows, int most_heads, int most_blocks, bool at_once) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  AppendPlan plan;
  // The most neighbouring heads, as neighbours in memory are read together, that leave at most an eighth of the rows
  // without work.
  plan.heads = 1;
  for (int heads = 2; heads <= std::min({num_heads, rows, most_heads}); ++heads)
    if (8 * (rows / heads) * num_heads >= 7 * rows * divide_up(num_heads, heads)) plan.heads = heads;
  const int64_t columns = divide_up(num_heads, plan.heads), block_tokens = rows / plan.heads;
  const int64_t pieces = divide_up(tokens, block_tokens);  // of tokens
  plan.both = 2 * pieces * columns > most_blocks;
  // As many as there may be, though the last front then has tokens for some only: fewer, with equally many fronts for
  // all, leave places of SMs empty. But two fronts of blocks that run at once are halves: what a whole one leaves would
  // have few warps.
  int64_t at_a_time = std::min(pieces, std::max<int64_t>(most_blocks / columns, 1));
  if (at_once && pieces > at_a_time && pieces <= 2 * at_a_time) at_a_time = divide_up(pieces, 2);
  plan.front = at_a_time * block_tokens;
  plan.blocks = at_a_time * columns * (plan.both ? 1 : 2);
  return plan;
}

template <int D, int kLanes, DType kType>
void append_with(const AppendParams& p, const DeviceLimits& limits, Stream stream) {
  using Shared = AppendShared<D, kLanes, kType>;
  const bool calibrated = p.transform.k_mean != nullptr;
  const int most_heads = calibrated ? kCalibrationBytes / Shared::kHeadBytes : kAppendRows<kLanes>;
  // More blocks than run at a time even out the end, but each loads the calibration of its heads.
  const int most_blocks = limits.sm_count * (calibrated ? kAppendBlocks<D, kLanes, kType, true>
                                                        : 4 * kAppendBlocks<D, kLanes, kType, false>);
  const AppendPlan plan =
      append_plan(p.num_tokens, p.num_kv_heads, kAppendRows<kLanes>, most_heads, most_blocks, calibrated);
  const int shared_bytes = Shared::kInputBytes + (calibrated ? plan.heads * Shared::kHeadBytes : 0);
  dispatch_groups(p.groups, "append_kv", [&](auto groups) {
    const auto run = [&](auto is_calibrated) {
      launch("saw_int4_append_kernel", saw_int4_append_kernel<D, kLanes, kType, groups(), is_calibrated()>, plan.blocks,
             kAppendThreads, shared_bytes, stream, p, plan);
    };
    calibrated ? run(std::true_type()) : run(std::false_type());
  });
}

inline void append(const AppendParams& p, const DeviceLimits& limits, Stream stream) {
  const char* op = "append_kv";
  if (p.num_tokens == 0) return;
  check_row_alignment(p.k, p.k_token_stride, p.dtype, op, "k");
  check_row_alignment(p.v, p.v_token_stride, p.dtype, op, "v");
  check_row_count(p.num_tokens, p.num_kv_heads, op);
  dispatch_head_dim(p.head_dim, op, [&](auto head_dim) {
    dispatch_dtype(p.dtype, [&](auto dtype) {
      constexpr int kFew = kAppendLanes<head_dim()>, kMany = kManyAppendLanes<head_dim()>;
      // A lane with more of a row takes longer for it: that pays where there are 384 rows of K and V per SM.
      const bool many = 2 * p.num_tokens * p.num_kv_heads >= int64_t{6} * kAppendRows<kMany> * limits.sm_count;
      many ? append_with<head_dim(), kMany, dtype()>(p, limits, stream)
           : append_with<head_dim(), kFew, dtype()>(p, limits, stream);
    });
  });
}

}  // namespace saw_int4
