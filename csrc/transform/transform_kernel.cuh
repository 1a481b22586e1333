// y = sign * H_R((x - mean) * mul), row by row: queries, fresh keys, and outputs on their way back. fp32 inside, each
// operation rounded once as csrc/cpu rounds it.
//
// 8 lanes per (token, head), as in append_kernel.cuh: lane i has words i, i + 8, ... of the row, 16-byte loads and
// stores. A row is read whole before it is written, so y may be x.
//
// Bound: HBM, 4 bytes per 16-bit channel.
// Assumes: x, y 16-byte aligned, token stride of whole 16 bytes.
#pragma once

#include "common/rows.cuh"
#include "format.h"

namespace saw_int4 {

inline constexpr int kTransformThreads = 256;
inline constexpr int kTransformRows = kTransformThreads / kLanesPerRow;  // (token, head) pairs per block

template <int D, DType kType>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(kTransformThreads, 2) saw_int4_transform_kernel(const TransformRowsParams p) {
  constexpr int kWords = words_per_lane(D), kRowWords = D / kCodesPerWord;
  const int lane = dev::lane_id() % kLanesPerRow;
  const uint32_t pair = static_cast<uint32_t>(dev::block_index()) * kTransformRows + dev::thread_index() / kLanesPerRow;
  const uint32_t token = pair / p.num_heads, head = pair - token * p.num_heads;
  const bool active = token < p.num_tokens;
  const uint32_t kv_head = head / (p.num_heads / p.num_kv_heads);

  float t[kWords][8];
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    const int index = kLanesPerRow * k + lane;
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i) t[k][i] = 0.f;
    if (!active || index >= kRowWords) continue;
    Channels<kType> channels;
    channels.template load<true>(p.x, token * p.x_token_stride + head * D + index * 8);
    channels.widen(t[k]);
    float vector[8];
    if (p.mean != nullptr) {
      load_channels<DType::kFloat32>(p.mean, kv_head * D + index * 8, vector);
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) t[k][i] = dev::sub_rn(t[k][i], vector[i]);
    }
    if (p.mul != nullptr) {
      load_channels<DType::kFloat32>(p.mul, kv_head * D + index * 8, vector);
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) t[k][i] = dev::mul_rn(t[k][i], vector[i]);
    }
  }
  if (p.rotation_order > 1) {
    hadamard_row<kWords>(t, p.rotation_order);
    const float norm = hadamard_norm(p.rotation_order);
    SAW_INT4_UNROLL
    for (int k = 0; k < kWords; ++k) {
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) t[k][i] = dev::mul_rn(t[k][i], norm);
    }
  }
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    const int index = kLanesPerRow * k + lane;
    if (!active || index >= kRowWords) continue;
    if (p.sign != nullptr) {
      float sign[8];
      load_channels<DType::kFloat32>(p.sign, kv_head * D + index * 8, sign);
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) t[k][i] = dev::mul_rn(t[k][i], sign[i]);
    }
    store_channels<kType>(p.y, static_cast<int64_t>(pair) * D + index * 8, t[k]);
  }
}

}  // namespace saw_int4
