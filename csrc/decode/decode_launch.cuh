// The last level of decode's dispatch: row tiles to kernel. Each head_dim is instantiated in its own translation
// units, so that they compile side by side; this file must not see decode_dispatch.h, which would instantiate them all.
#pragma once

#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "decode/decode_kernel.cuh"
#include "decode/merge_kernel.cuh"

namespace saw_int4 {

template <int D, int kGroups>
void launch_decode(const DecodeParams& p, const DecodePlan& plan, Stream stream) {
  const auto with = [&](auto kernel) {
    launch("saw_int4_decode_kernel", kernel, plan.blocks, plan.warps * 32, plan.shared_bytes, stream, p, plan);
    if (!plan.merge_launch) return;
    const MergePlan merge = merge_plan(plan, p.num_requests, p.max_q_len);
    launch_dependent("saw_int4_decode_merge_kernel", saw_int4_decode_merge_kernel<D>, merge.blocks, kMergeWarps * 32,
                     kMergeWarps * Record<D>::kBytes, stream, p, plan, merge);
  };
  if (plan.row_tiles == 1) return with(saw_int4_decode_kernel<D, 1, kGroups>);
  if constexpr (max_row_tiles(D, kGroups) >= 2)
    if (plan.row_tiles == 2) return with(saw_int4_decode_kernel<D, 2, kGroups>);
  if constexpr (max_row_tiles(D, kGroups) >= 4)
    if (plan.row_tiles == 4) return with(saw_int4_decode_kernel<D, 4, kGroups>);
  throw std::logic_error("decode_attention: no kernel for head_dim " + std::to_string(D) + " with " +
                         std::to_string(plan.row_tiles) + " row tiles");
}

}  // namespace saw_int4
