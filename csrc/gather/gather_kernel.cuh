// INT4 rows at N slots -> 16-bit (or fp32) K and V [N, H_kv, D], still transformed: x = scale * code + offset, rounded
// after the product and after the sum, then to the output, as csrc/cpu does it.
//
// 8 lanes per (token, head), K and V of it together; lane i turns words i, i + 8, ... into 8 channels each: a 4-byte
// load, a 16-byte store. Lanes of a row read one contiguous run, and rows of a token follow each other.
//
// Bound: HBM; the output is 3.8 times the input: (512 + 132) bytes per head_dim 256 row and tensor in bf16.
// Assumes: outputs 16-byte aligned.
#pragma once

#include "common/rows.cuh"
#include "format.h"

namespace saw_int4 {

inline constexpr int kGatherThreads = 256;
template <int D>
inline constexpr int kGatherLanes = row_lanes(D, 8);  // of a row
template <int D>
inline constexpr int kGatherRows = kGatherThreads / kGatherLanes<D>;  // (token, head) pairs per block

template <int D, DType kType, int kGroups>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(kGatherThreads, 4) saw_int4_gather_kernel(const GatherParams p) {
  using Row = SpreadRow<D, kGatherLanes<D>>;
  const uint32_t pair =
      static_cast<uint32_t>(dev::block_index()) * kGatherRows<D> + dev::thread_index() / kGatherLanes<D>;
  const uint32_t token = pair / p.num_kv_heads, head = pair - token * p.num_kv_heads;
  if (token >= p.num_tokens) return;
  const int64_t slot = dev::ld_global(p.slots + token);
  if (slot < 0 || slot >= p.num_slots) dev::trap();
  const int64_t from = (slot * p.num_kv_heads + head) * row_bytes(D, kGroups);
  const int64_t to = static_cast<int64_t>(pair) * D;

  uint32_t words[2][Row::kWords], params[2][kGroups];
  SAW_INT4_UNROLL
  for (int tensor = 0; tensor < 2; ++tensor) {
    const auto* row = reinterpret_cast<const uint32_t*>((tensor == 0 ? p.k_cache : p.v_cache) + from);
    SAW_INT4_UNROLL
    for (int g = 0; g < kGroups; ++g) params[tensor][g] = dev::ld_global(row + D / kCodesPerWord + g);
    SAW_INT4_UNROLL
    for (int k = 0; k < Row::kWords; ++k) words[tensor][k] = dev::ld_global(row + Row::word(k));
  }
  SAW_INT4_UNROLL
  for (int tensor = 0; tensor < 2; ++tensor) {
    float scale[kGroups], offset[kGroups];
    SAW_INT4_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      scale[g] = dev::f16_to_float(static_cast<uint16_t>(params[tensor][g]));
      offset[g] = dev::f16_to_float(static_cast<uint16_t>(params[tensor][g] >> 16));
    }
    SAW_INT4_UNROLL
    for (int k = 0; k < Row::kWords; ++k) {
      float x[8];
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) {
        // 2^23 + code as bits is a float: no integer conversion.
        constexpr uint32_t kMagicBits = 0x4b000000u;
        const uint32_t code = dev::lop3_and_or(words[tensor][k] >> bit_of_channel(i), kCodeMax, kMagicBits);
        const int g = group_of_channel(i, kGroups);
        x[i] = dev::add_rn(dev::mul_rn(scale[g], dev::sub_rn(dev::bits_float(code), dev::bits_float(kMagicBits))),
                           offset[g]);
      }
      store_channels<kType>(tensor == 0 ? p.k_out : p.v_out, to + Row::word(k) * 8, x);
    }
  }
}

}  // namespace saw_int4
