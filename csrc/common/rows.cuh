// Eight neighbouring channels of a row at a time, in any of the model's dtypes, and the Hadamard transform of a row
// whose channels lie in the lanes of a warp.
#pragma once

#include "common/device.h"
#include "params.h"

namespace saw_int4 {

// x[0..7] <- channels index .. index + 7, index a multiple of 8 and the base 16-byte aligned.
SAW_INT4_DEVICE void load_channels(const void* base, int64_t index, DType dtype, float (&x)[8]) {
  if (dtype == DType::kFloat32) {
    SAW_INT4_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float4 v = dev::ld_global(reinterpret_cast<const float4*>(static_cast<const float*>(base) + index) + h);
      x[4 * h + 0] = v.x;
      x[4 * h + 1] = v.y;
      x[4 * h + 2] = v.z;
      x[4 * h + 3] = v.w;
    }
    return;
  }
  const uint4 v = dev::ld_global(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + index));
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  SAW_INT4_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto lo = static_cast<uint16_t>(words[i]), hi = static_cast<uint16_t>(words[i] >> 16);
    x[2 * i] = dtype == DType::kFloat16 ? dev::f16_to_float(lo) : dev::bf16_to_float(lo);
    x[2 * i + 1] = dtype == DType::kFloat16 ? dev::f16_to_float(hi) : dev::bf16_to_float(hi);
  }
}

// Two floats as two 16-bit values, rounded to nearest even.
SAW_INT4_DEVICE uint32_t pack_pair(float lo, float hi, DType dtype) {
  return dtype == DType::kFloat16 ? dev::pack_f16x2(lo, hi) : dev::pack_bf16x2(lo, hi);
}

SAW_INT4_DEVICE void store_channels(void* base, int64_t index, DType dtype, const float (&x)[8]) {
  if (dtype == DType::kFloat32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
    dev::st_global(p, float4{x[0], x[1], x[2], x[3]});
    dev::st_global(p + 1, float4{x[4], x[5], x[6], x[7]});
    return;
  }
  const uint4 v{pack_pair(x[0], x[1], dtype), pack_pair(x[2], x[3], dtype), pack_pair(x[4], x[5], dtype),
                pack_pair(x[6], x[7], dtype)};
  dev::st_global(reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + index), v);
}

// order ** -0.5, rounded to fp32: exact for even powers of two, sqrt(1/2) times such a one for odd powers.
SAW_INT4_DEVICE float hadamard_norm(int order) {
  int log2 = 0;
  while ((1 << log2) < order) ++log2;
  const float power = dev::bits_float(static_cast<uint32_t>(127 - (log2 + 1) / 2) << 23);  // 2 ** -ceil(log2 / 2)
  return log2 % 2 == 0 ? power : power * 1.41421356237309504880f;
}

// Unnormalised Hadamard transform of blocks of `order` channels; the lane holds channels lane*N .. lane*N + N - 1 of a
// row that starts at a lane divisible by order / N. Strides ascend, (lo, hi) <- (lo + hi, lo - hi): format.h's order.
template <int N>
SAW_INT4_DEVICE void hadamard(float (&x)[N], int order) {
  SAW_INT4_UNROLL
  for (int stride = 1; stride < N; stride *= 2) {
    if (stride < order) {
      SAW_INT4_UNROLL
      for (int i = 0; i < N; ++i) {
        if (i & stride) continue;
        const float lo = x[i], hi = x[i + stride];
        x[i] = dev::add_rn(lo, hi);
        x[i + stride] = dev::sub_rn(lo, hi);
      }
    }
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    if (mask * N < order) {
      const bool upper = dev::lane_id() & mask;
      SAW_INT4_UNROLL
      for (int i = 0; i < N; ++i) {
        const float other = dev::shfl_xor(x[i], mask);
        x[i] = upper ? dev::sub_rn(other, x[i]) : dev::add_rn(x[i], other);
      }
    }
  }
}

}  // namespace saw_int4
