// K and V of T new tokens -> INT4 rows at their slots: t = sign * H_R((x - mu) / s), then 4-bit codes and their
// fitted scale and offset, byte for byte as format.h states and csrc/cpu computes it (nothing is contracted).
//
// 8 lanes per row of one (token, head): lane i loads words i, i + 8, ... of it (16 bytes each, all in flight before the
// first use) and stores the same words of codes. Hadamard strides 1, 2, 4 lie in a lane, 8 to 32
// across lanes, 64 and 128 in a lane again; minimum and maximum take 3 shuffles each.
//
// Parameters are fitted last, one row per lane: divisions and 64-bit sums then cost one row's worth per 8.
//
// Bound: HBM. A head_dim 256 row of K and V moves 2 * (512 + 132) bytes, 95 cycles of an H100 SM's share = 380 issue
// slots; README.md counts what the warp spends on four of them.
// Assumes: k, v 16-byte aligned with token strides of whole 16 bytes; equal slots race, any one wins.
#pragma once

#include "common/rows.cuh"
#include "format.h"

namespace saw_int4 {

inline constexpr int kAppendThreads = 256;
inline constexpr int kAppendRows = kAppendThreads / kLanesPerRow;  // (token, head) pairs per block and round
inline constexpr int kManyRowBlocks = 2048;                        // blocks' worth of rows that make several rounds pay

// Adding 1.5 * 2^23 rounds a small float to an integer, half to even, and leaves it in the low bits. Sums of such bits
// are taken modulo 2^32 and the constant removed once: no conversion, no mask.
inline constexpr float kRounder = 12582912.f;
inline constexpr uint32_t kRounderBits = 0x4b400000u;

// Sums over a row of format.h's fit: of the codes, their squares, f, and code * f.
struct FitSums {
  uint32_t s1 = 0, s2 = 0, total = 0, cross = 0;
};

// A row whose codes are stored and whose parameters are not: what they are fitted from.
struct OpenRow {
  uint8_t* row = nullptr;  // null: no row
  float scale = 0.f, offset = 0.f;
  uint32_t squares_and_codes = 0, total = 0, cross = 0;
};

// Fits and stores the parameters of one row per lane, so that divisions and 64-bit sums are paid once per 32 rows.
template <int D>
SAW_INT4_DEVICE void close_row(const OpenRow& open) {
  if (open.row == nullptr) return;
  float scale = open.scale, offset = open.offset;
  const int64_t s1 = open.squares_and_codes & 0xffffu, s2 = open.squares_and_codes >> 16;
  const int64_t total = static_cast<int32_t>(open.total), cross = static_cast<int32_t>(open.cross);
  const int64_t spread = D * s2 - s1 * s1;
  bool finite = dev::is_finite(scale) && dev::is_finite(offset);
  if (finite && scale != 0.f && spread != 0) {
    constexpr float kUnit = 1.f / kFitUnits;  // a power of two: dividing and multiplying round alike
    const float a =
        dev::mul_rn(dev::div_rn(static_cast<float>(D * cross - s1 * total), static_cast<float>(spread)), kUnit);
    const float b = dev::div_rn(
        dev::sub_rn(dev::mul_rn(static_cast<float>(total), kUnit), dev::mul_rn(a, static_cast<float>(s1))), float(D));
    offset = dev::add_rn(offset, dev::mul_rn(scale, b));
    scale = dev::mul_rn(scale, a);
  }
  const uint16_t scale_bits = dev::float_to_f16(scale), offset_bits = dev::float_to_f16(offset);
  finite = finite && dev::is_finite(dev::f16_to_float(scale_bits)) && dev::is_finite(dev::f16_to_float(offset_bits));
  const bool zero_offset = (offset_bits & 0x7fffu) == 0;  // of either sign: stored as +0
  const uint32_t params = finite ? scale_bits | (zero_offset ? 0u : static_cast<uint32_t>(offset_bits) << 16)
                                 : kNanParam | static_cast<uint32_t>(kNanParam) << 16;
  dev::st_global(reinterpret_cast<uint32_t*>(open.row + scale_byte(D)), params);
  if (finite) return;
  SAW_INT4_UNROLL_BY(1)
  for (int w = 0; w < D / kCodesPerWord; ++w) dev::st_global(reinterpret_cast<uint32_t*>(open.row) + w, 0u);
}

// Codes of 8 channels of a row, and their share of the fit.
SAW_INT4_DEVICE uint32_t quantize_word(const float (&t)[8], float offset, float inverse, FitSums& sums) {
  uint32_t word = 0, total = 0, cross = 0, bias = 0;
  SAW_INT4_UNROLL
  for (int i = 0; i < 8; ++i) {
    const float u = dev::mul_rn(dev::sub_rn(t[i], offset), inverse);
    const float code = dev::fmin(dev::fmax(u, 0.f), float(kCodeMax));
    const float fixed = dev::fmin(dev::fmax(u, -1.f), float(kCodeMax + 1));
    const uint32_t code_bits = dev::float_bits(dev::add_rn(code, kRounder));
    const uint32_t fixed_bits = dev::float_bits(dev::fma_rn(fixed, float(kFitUnits), kRounder));
    word += code_bits << bit_of_channel(i);
    bias += kRounderBits << bit_of_channel(i);
    total += fixed_bits;
    cross += code_bits * fixed_bits;
  }
  word -= bias;
  total -= 8 * kRounderBits;
  const uint32_t even = word & 0x0f0f0f0fu, odd = word >> 4 & 0x0f0f0f0fu;
  const uint32_t s1 = dev::dot_u8x4(even, 0x01010101u, dev::dot_u8x4(odd, 0x01010101u, 0));
  sums.s1 += s1;
  sums.s2 = dev::dot_u8x4(even, even, dev::dot_u8x4(odd, odd, sums.s2));
  sums.total += total;
  sums.cross += cross - kRounderBits * (s1 + total) - 8 * kRounderBits * kRounderBits;
  return word;
}

// Stores the lane's words of one row as codes, and returns what the parameters follow from, the same in its 8 lanes.
// row: first byte, 4-byte aligned, or null.
template <int D>
SAW_INT4_DEVICE OpenRow quantize_row(const float (&t)[words_per_lane(D)][8], uint8_t* row) {
  constexpr int kWords = words_per_lane(D), kRowWords = D / kCodesPerWord;
  const int lane = dev::lane_id() % kLanesPerRow;
  // NaN wins both, so that one bad channel marks the row.
  float low = INFINITY, high = -INFINITY;
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    if (kLanesPerRow * k + lane >= kRowWords) continue;
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i) {
      low = dev::fmin_nan(low, t[k][i]);
      high = dev::fmax_nan(high, t[k][i]);
    }
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kLanesPerRow; mask *= 2) {
    low = dev::fmin_nan(low, dev::shfl_xor(low, mask));
    high = dev::fmax_nan(high, dev::shfl_xor(high, mask));
  }
  OpenRow open;
  open.row = row;
  open.scale = dev::f16_to_float(dev::float_to_f16(dev::div_rn(dev::sub_rn(high, low), float(kCodeMax))));
  open.offset = dev::f16_to_float(dev::float_to_f16(low));
  const bool has_codes = dev::is_finite(open.scale) && dev::is_finite(open.offset) && open.scale != 0.f;
  const float inverse = dev::div_rn(1.f, open.scale);
  FitSums sums;
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    const int index = kLanesPerRow * k + lane;
    if (index >= kRowWords) continue;
    const uint32_t word = quantize_word(t[k], open.offset, inverse, sums);
    if (row != nullptr) dev::st_global(reinterpret_cast<uint32_t*>(row) + index, has_codes ? word : 0u);
  }
  open.squares_and_codes = sums.s2 << 16 | sums.s1;  // 15^2 * 256 < 2^16, 15 * 256 < 2^16
  open.total = sums.total;
  open.cross = sums.cross;
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kLanesPerRow; mask *= 2) {
    open.squares_and_codes += dev::shfl_xor(open.squares_and_codes, mask);
    open.total += dev::shfl_xor(open.total, mask);
    open.cross += dev::shfl_xor(open.cross, mask);
  }
  return open;
}

// Blocks per SM that the registers allow without spilling.
constexpr int append_blocks_per_sm(int head_dim, DType dtype) {
  return dtype == DType::kFloat32 ? 2 : head_dim <= 128 ? 4 : 3;
}

// Transforms and quantizes one row (8 lanes), up to its parameters.
template <int D, DType kType>
SAW_INT4_DEVICE OpenRow append_row(const AppendParams& p, bool is_v, uint32_t pair) {
  constexpr int kWords = words_per_lane(D), kRowWords = D / kCodesPerWord;
  const int lane = dev::lane_id() % kLanesPerRow;
  const uint32_t token = pair / p.num_kv_heads, head = pair - token * p.num_kv_heads;
  const int64_t slot = token < p.num_tokens ? dev::ld_global(p.slots + token) : -1;
  if (slot >= p.num_slots) dev::trap();
  const bool active = slot >= 0;

  const void* x = is_v ? p.v : p.k;
  const int64_t from = token * (is_v ? p.v_token_stride : p.k_token_stride) + head * D;
  Channels<kType> raw[kWords];
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    const int index = kLanesPerRow * k + lane;
    raw[k] = {};
    if (active && index < kRowWords) raw[k].load(x, from + index * 8);
  }

  const TransformParams& tr = p.transform;
  const bool calibrated = !is_v && tr.k_mean != nullptr;
  float t[kWords][8];
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    raw[k].widen(t[k]);
    const int index = kLanesPerRow * k + lane;
    if (!calibrated || index >= kRowWords) continue;
    float mean[8], inv_scale[8];
    load_channels<DType::kFloat32>(tr.k_mean, head * D + index * 8, mean);
    load_channels<DType::kFloat32>(tr.k_inv_scale, head * D + index * 8, inv_scale);
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i) t[k][i] = dev::mul_rn(dev::sub_rn(t[k][i], mean[i]), inv_scale[i]);
  }
  if (tr.rotation_order > 1 && (!is_v || tr.rotate_v)) {
    hadamard_row<kWords>(t, tr.rotation_order);
    const float norm = hadamard_norm(tr.rotation_order);
    SAW_INT4_UNROLL
    for (int k = 0; k < kWords; ++k) {
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) t[k][i] = dev::mul_rn(t[k][i], norm);
    }
  }
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    const int index = kLanesPerRow * k + lane;
    if (!calibrated || index >= kRowWords) continue;
    float sign[8];
    load_channels<DType::kFloat32>(tr.k_sign, head * D + index * 8, sign);
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i) t[k][i] = dev::mul_rn(t[k][i], sign[i]);
  }
  const int64_t row = (slot * p.num_kv_heads + head) * row_bytes(D);
  return quantize_row<D>(t, active ? (is_v ? p.v_cache : p.k_cache) + row : nullptr);
}

// The first half of the grid does K, the second half V; 8 lanes do `rounds` rows (1 .. 8), one after the other.
template <int D, DType kType>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(kAppendThreads, append_blocks_per_sm(D, kType))
    saw_int4_append_kernel(const AppendParams p, const int rounds) {
  const int blocks_per_tensor = dev::block_count() / 2;
  const bool is_v = dev::block_index() >= blocks_per_tensor;
  const uint32_t block = dev::block_index() - (is_v ? blocks_per_tensor : 0);
  OpenRow mine;
  SAW_INT4_UNROLL_BY(1)
  for (int round = 0; round < rounds; ++round) {
    const uint32_t pair = (block * rounds + round) * kAppendRows + dev::thread_index() / kLanesPerRow;
    const OpenRow open = append_row<D, kType>(p, is_v, pair);
    if (dev::lane_id() % kLanesPerRow == round) mine = open;
  }
  dev::warp_sync();  // the codes of a damaged row are overwritten below
  close_row<D>(mine);
}

}  // namespace saw_int4
