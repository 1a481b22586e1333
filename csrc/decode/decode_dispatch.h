// From DecodeParams to one launch, or two: what the kernel cannot take is refused, the rest is planned and launched.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dispatch.h"
#include "common/launch.h"
#include "decode/config.h"
#include "decode/schedule.h"

namespace saw_int4 {

// Launches the kernel of head_dim D and so many groups per row that plan.row_tiles names (decode_launch.cuh; one
// translation unit for each).
template <int D, int kGroups>
void launch_decode(const DecodeParams& p, const DecodePlan& plan, Stream stream);

inline void check_decode(const DecodeParams& p, const DecodePlan& plan, const DecodeShape& shape) {
  const auto fail = [](const std::string& text) { throw std::runtime_error("decode_attention: " + text); };
  if (p.dtype == DType::kFloat32) fail("q is float32, the CUDA kernel takes bfloat16 or float16; convert q and out");
  check_row_alignment(p.q, p.q_token_stride, p.dtype, "decode_attention", "q");
  if (reinterpret_cast<uintptr_t>(p.k_cache) % 16 != 0 || reinterpret_cast<uintptr_t>(p.v_cache) % 16 != 0)
    fail("k_cache or v_cache does not start at a multiple of 16 bytes; pass the whole pool tensor");
  const int64_t units = ((p.table_stride >> plan.tile_shift) + 1) * most_runs(plan, p.num_requests, p.max_q_len);
  if (units > INT32_MAX - plan.blocks)
    fail(std::to_string(p.num_requests) + " requests of " + std::to_string(p.max_q_len) + " query rows and " +
         std::to_string(p.table_stride) + " tokens are more than one launch can count; call it with fewer requests");
  const int64_t needed = workspace_needed(plan, shape, p.num_query_rows);
  if (p.workspace == nullptr || p.workspace_bytes < needed || p.workspace_bytes % 4 != 0)
    fail("workspace has " + std::to_string(p.workspace_bytes) + " bytes, expected at least " + std::to_string(needed) +
         " for " + std::to_string(p.num_query_rows) + " query rows; make it with ops.decode_workspace");
}

inline void decode(const DecodeParams& p, const DeviceLimits& limits, Stream stream) {
  if (p.num_requests == 0) return;
  const int group = p.num_q_heads / p.num_kv_heads;
  if (int64_t{p.max_q_len} * group > UINT16_MAX)  // plans count in 32 bits
    throw std::runtime_error("decode_attention: max_q_len is " + std::to_string(p.max_q_len) + ", expected at most " +
                             std::to_string(UINT16_MAX / group) + " with " + std::to_string(group) +
                             " query heads per KV head; call it with fewer query rows per request");
  const DecodeShape shape{p.head_dim,  p.num_q_heads,     p.num_kv_heads, p.num_requests,
                          p.max_q_len, p.batch_invariant, p.groups};
  const DecodePlan plan = decode_plan(shape, limits);
  check_decode(p, plan, shape);
  dispatch_head_dim(p.head_dim, "decode_attention", [&](auto head_dim) {
    dispatch_groups(p.groups, "decode_attention",
                    [&](auto groups) { launch_decode<head_dim(), groups()>(p, plan, stream); });
  });
}

}  // namespace saw_int4
