// What narrow and wide passes share of the running softmax: its units, masks, and the parameters of rows.
#pragma once

#include "common/device.h"
#include "decode/config.h"
#include "decode/query.cuh"
#include "format.h"

namespace saw_int4 {

// A row's reference logit moves only when a logit exceeds it by this much: weights are below 2^kSlack, and their
// products with scales in units of v_unit below 2^15.
inline constexpr float kSlack = 4.f;
inline constexpr int kWeightBits = 11;

// 2^kWeightBits / v_cap, v_cap a power of two: brings p * scale into fp16's normal range, whatever the scale.
SAW_INT4_DEVICE float v_unit(float v_cap) {
  return dev::bits_float((static_cast<uint32_t>(254 + kWeightBits) << 23) - dev::float_bits(v_cap));
}

// Raises v_cap above a scale of V that reached it; returns what sums in units of the old one must be multiplied by.
SAW_INT4_DEVICE float raise_cap(float& v_cap, float v_scale) {
  if (!(v_scale >= v_cap && v_scale > 0.f)) return 1.f;
  const uint32_t exponent = (dev::float_bits(v_scale) >> 23) + 1;
  const float keep = v_cap * dev::bits_float((254 - exponent) << 23);
  v_cap = dev::bits_float(exponent << 23);
  return keep;
}

// cap * tanh(x / cap), tanh(y) = 1 - 2 / (e^2y + 1); exact to fp32's last bits of cap, which is all a logit needs. In
// units of log2, as logits are.
struct SoftCap {
  float cap, inverse;  // 2 log2(e) / cap

  SAW_INT4_DEVICE explicit SoftCap(float logit_cap)
      : cap(logit_cap * kLog2e), inverse(dev::div_rn(2.f * kLog2e, cap)) {}
  SAW_INT4_DEVICE float operator()(float logit) const {
    const float power = dev::exp2_approx(logit * inverse);
    return dev::fma_rn(-2.f * cap, dev::rcp_approx(power + 1.f), cap);
  }
};

// What hides tokens from query rows: addresses in shared memory. rows[n] = {end, begin, tree bits low, high}; tree_base
// is the first new token when there is a tree mask, else past every token.
struct Masks {
  uint32_t rows, tree_base;
};

SAW_INT4_DEVICE bool visible(int token, const uint4& row, int tree_base) {
  if (token >= static_cast<int>(row.x) || token < static_cast<int>(row.y)) return false;
  if (token < tree_base) return true;
  const int bit = token - tree_base;
  return ((bit < 32 ? row.z >> bit : row.w >> (bit - 32)) & 1u) != 0;
}

// Logits of tokens that a query row may not see <- -inf. w[mt]: of 16 tokens, the lane's as the tensor cores leave
// them.
template <int MT, int NT, int kGroups>
SAW_INT4_DEVICE void hide(float (&w)[MT][kGroups][NT][4], int token, const Masks& masks) {
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4;
  const auto tree_base = dev::ld_shared<int32_t>(masks.tree_base);
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      const auto row = dev::ld_shared<uint4>(masks.rows + (nt * kRowsPerTile + 2 * c + u) * 16);
      SAW_INT4_UNROLL
      for (int mt = 0; mt < MT; ++mt) {
        SAW_INT4_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (!visible(token + 16 * mt + 8 * half + g, row, tree_base)) w[mt][0][nt][2 * half + u] = -INFINITY;
        }
      }
    }
  }
}

// The parameters of a row's groups, scale in the low half; row_params: their shared address.
template <int kGroups>
SAW_INT4_DEVICE void load_params(uint32_t row_params, uint32_t (&params)[kGroups]) {
  if constexpr (kGroups == 1) {
    params[0] = dev::ld_shared<uint32_t>(row_params);
  } else {
    const auto both = dev::ld_shared<uint2>(row_params);
    params[0] = both.x;
    params[1] = both.y;
  }
}
SAW_INT4_DEVICE float param_scale(uint32_t params) {
  return dev::f16_to_float(static_cast<uint16_t>(params));
}
SAW_INT4_DEVICE float param_offset(uint32_t params) {
  return dev::f16_to_float(static_cast<uint16_t>(params >> 16));
}

}  // namespace saw_int4
