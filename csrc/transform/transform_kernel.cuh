// y = sign * H_R((x - mean) * mul), row by row: queries, fresh keys, and outputs on their way back. fp32 inside, each
// operation rounded once as csrc/cpu rounds it.
//
// 4 lanes per (token, head): lane i has words i, i + 4, ... of the row, 16-byte loads and stores. A row is read whole
// before it is written, so y may be x.
//
// Bound: HBM, 4 bytes per 16-bit channel.
// Assumes: x, y 16-byte aligned, token stride of whole 16 bytes.
#pragma once

#include "common/rows.cuh"
#include "format.h"

namespace saw_int4 {

inline constexpr int kTransformThreads = 128;
template <int D>
inline constexpr int kTransformLanes = row_lanes(D, 4);  // of a row
template <int D>
inline constexpr int kTransformRows = kTransformThreads / kTransformLanes<D>;  // (token, head) pairs per block

template <int D, DType kType>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(kTransformThreads, D > 128 ? 3 : 5)
    saw_int4_transform_kernel(const TransformRowsParams p) {
  constexpr int kLanes = kTransformLanes<D>;
  using Row = SpreadRow<D, kLanes>;
  const uint32_t pair = static_cast<uint32_t>(dev::block_index()) * kTransformRows<D> + dev::thread_index() / kLanes;
  const uint32_t token = pair / p.num_heads, head = pair - token * p.num_heads;
  const uint32_t kv_head = head / (p.num_heads / p.num_kv_heads);
  const auto of_head = [&](const float* vectors) { return vectors == nullptr ? nullptr : vectors + kv_head * D; };
  const bool exists = token < p.num_tokens;

  Channels<kType> raw[Row::kWords] = {};
  if (exists) {
    const int64_t from = token * p.x_token_stride + head * D;
    SAW_INT4_UNROLL
    for (int k = 0; k < Row::kWords; ++k) raw[k].template load<true>(p.x, from + Row::word(k) * 8);
  }
  typename Row::Values t;
  SAW_INT4_UNROLL
  for (int k = 0; k < Row::kWords; ++k) raw[k].widen(t[k]);
  const float norm = transform_row<D, kLanes>(t, p.rotation_order, of_head(p.mean), of_head(p.mul), of_head(p.sign));
  if (norm != 1.f) for_channels(t, [&](float x) { return dev::mul_rn(x, norm); });
  if (!exists) return;
  SAW_INT4_UNROLL
  for (int k = 0; k < Row::kWords; ++k)
    store_channels<kType>(p.y, static_cast<int64_t>(pair) * D + Row::word(k) * 8, t[k]);
}

}  // namespace saw_int4
