// K and V of T new tokens -> INT4 rows at their slots: t = sign * H_R((x - mu) / s), then 4-bit codes and their
// fitted scale and offset, byte for byte as format.h states and csrc/cpu computes it (nothing is contracted).
//
// 4 lanes per row of one (token, head), 2 where 4 do not divide it: lane i takes words i, i + 4, ... of it, and stores
// the same words of codes. Hadamard strides 1, 2, 4 lie in a lane, 8 and 16 across lanes, the rest in a lane again: the
// more of a row a lane holds, the less it shuffles and computes once per row, but the narrower are its copies.
//
// The next row is copied to shared memory meanwhile. Parameters are fitted last, one row per lane: divisions and 64-bit
// sums then cost one row's worth per group of lanes.
//
// Bound: HBM. A head_dim 256 row of K and V moves 2 * (512 + 132) bytes, 95 cycles of an H100 SM's share = 380 issue
// slots; README.md counts what the warp spends on four of them.
// Assumes: k, v 16-byte aligned with token strides of whole 16 bytes; equal slots race, any one wins.
#pragma once

#include "common/rows.cuh"
#include "format.h"

namespace saw_int4 {

inline constexpr int kAppendThreads = 64;
// A group of lanes does several rows one after the other, if there are so many that every SM still gets enough blocks.
inline constexpr int kAppendRounds = 8;
inline constexpr int kAppendBlocksOfTensorPerSm = 12;

template <int D>
inline constexpr int kAppendLanes = row_lanes(D, 4);  // of a row
template <int D>
inline constexpr int kAppendRows = kAppendThreads / kAppendLanes<D>;  // (token, head) pairs per block and round
template <int D>
using AppendRow = SpreadRow<D, kAppendLanes<D>>;

// Adding 1.5 * 2^23 rounds a small float to an integer, half to even, and leaves it in the low bits. Sums of such bits
// are taken modulo 2^32 and the constant removed once: no conversion, no mask.
inline constexpr float kRounder = 12582912.f;
inline constexpr uint32_t kRounderBits = 0x4b400000u;

// Sums over a row of format.h's fit: of the codes, their squares, f, and code * f.
struct FitSums {
  uint32_t s1 = 0, s2 = 0, total = 0, cross = 0;
};

// A group of channels whose codes are chosen and whose parameters are not: what they are fitted from.
struct OpenGroup {
  float scale = 0.f, offset = 0.f;
  uint32_t squares_and_codes = 0, total = 0, cross = 0;
};
template <int kGroups>
struct OpenRow {
  uint8_t* row = nullptr;  // null: no row
  OpenGroup group[kGroups];
};

// The parameters of a group of n channels, scale in the low half; `finite` becomes false where they are not.
template <int n>
SAW_INT4_DEVICE uint32_t fit(const OpenGroup& open, bool& finite) {
  float scale = open.scale, offset = open.offset;
  const int64_t s1 = open.squares_and_codes & 0xffffu, s2 = open.squares_and_codes >> 16;
  const int64_t total = static_cast<int32_t>(open.total), cross = static_cast<int32_t>(open.cross);
  const int64_t spread = n * s2 - s1 * s1;
  finite = finite && dev::is_finite(scale) && dev::is_finite(offset);
  if (finite && scale != 0.f && spread != 0) {
    constexpr float kUnit = 1.f / kFitUnits;  // a power of two: dividing and multiplying round alike
    const float a =
        dev::mul_rn(dev::div_rn(static_cast<float>(n * cross - s1 * total), static_cast<float>(spread)), kUnit);
    const float b = dev::div_rn(
        dev::sub_rn(dev::mul_rn(static_cast<float>(total), kUnit), dev::mul_rn(a, static_cast<float>(s1))), float(n));
    offset = dev::add_rn(offset, dev::mul_rn(scale, b));
    scale = dev::mul_rn(scale, a);
  }
  const uint16_t scale_bits = dev::float_to_f16(scale), offset_bits = dev::float_to_f16(offset);
  finite = finite && dev::is_finite(dev::f16_to_float(scale_bits)) && dev::is_finite(dev::f16_to_float(offset_bits));
  const bool zero_offset = (offset_bits & 0x7fffu) == 0;  // of either sign: stored as +0
  return scale_bits | (zero_offset ? 0u : static_cast<uint32_t>(offset_bits) << 16);
}

// Fits and stores the parameters of one row per lane, so that divisions and 64-bit sums are paid once per 32 rows.
template <int D, int kGroups>
SAW_INT4_DEVICE void close_row(const OpenRow<kGroups>& open) {
  if (open.row == nullptr) return;
  bool finite = true;
  uint32_t params[kGroups];
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) params[g] = fit<D / kGroups>(open.group[g], finite);
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g)
    dev::st_global(reinterpret_cast<uint32_t*>(open.row + scale_byte(D, g)),
                   finite ? params[g] : kNanParam | static_cast<uint32_t>(kNanParam) << 16);
  if (finite) return;
  SAW_INT4_UNROLL_BY(1)
  for (int w = 0; w < D / kCodesPerWord; ++w) dev::st_global(reinterpret_cast<uint32_t*>(open.row) + w, 0u);
}

// The channel of a word whose code starts at a bit.
constexpr int channel_at_bit(int bit) {
  int channel = 0;
  while (bit_of_channel(channel) != bit) ++channel;
  return channel;
}

// The low bytes of x[channel] of the channels whose codes start at bits first, first + 8, first + 16, first + 24.
SAW_INT4_DEVICE uint32_t low_bytes(const uint32_t (&x)[8], int first) {
  const auto pair = [&](int bit) { return dev::prmt(x[channel_at_bit(bit)], x[channel_at_bit(bit + 8)], 0x0040); };
  return dev::prmt(pair(first), pair(first + 16), 0x5410);
}

// 1 in the bytes of low_bytes(.., first) that belong to channels of the group.
constexpr uint32_t ones_of_group(int first, int group, int groups) {
  uint32_t ones = 0;
  for (int byte = 0; byte < 4; ++byte)
    if (group_of_channel(channel_at_bit(first + 8 * byte), groups) == group) ones |= 1u << 8 * byte;
  return ones;
}

// Where a row's values lie in units of the codes: u = (t - offset) * inverse.
template <int kGroups>
struct Units {
  float offset[kGroups], inverse[kGroups];
};

// Codes of 8 channels of a row, and their share of the fit. kClamp: some may lie outside 0 .. 15 without it.
template <bool kClamp, int kGroups>
SAW_INT4_DEVICE uint32_t quantize_word(const float (&t)[8], const Units<kGroups>& units, FitSums (&sums)[kGroups]) {
  uint32_t code_bits[8];
  SAW_INT4_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int g = group_of_channel(i, kGroups);
    const float u = dev::mul_rn(dev::sub_rn(t[i], units.offset[g]), units.inverse[g]);
    const float code = kClamp ? dev::fmin(dev::fmax(u, 0.f), float(kCodeMax)) : u;
    const float fixed = kClamp ? dev::fmin(dev::fmax(u, -1.f), float(kCodeMax + 1)) : u;
    code_bits[i] = dev::float_bits(dev::add_rn(code, kRounder));
    const uint32_t fixed_bits = dev::float_bits(dev::fma_rn(fixed, float(kFitUnits), kRounder));
    sums[g].total += fixed_bits;
    sums[g].cross += code_bits[i] * fixed_bits;
  }
  const uint32_t low = low_bytes(code_bits, 0), high = low_bytes(code_bits, 4);  // nibbles of the word's bytes
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    const uint32_t low_ones = ones_of_group(0, g, kGroups), high_ones = ones_of_group(4, g, kGroups);
    sums[g].s1 = dev::dot_u8x4(low, low_ones, dev::dot_u8x4(high, high_ones, sums[g].s1));
    sums[g].s2 = dev::dot_u8x4(low, low & low_ones * 0xffu, dev::dot_u8x4(high, high & high_ones * 0xffu, sums[g].s2));
  }
  return low | high << 4;
}

// The lane's words of one row, quantized and stored (row: first byte, 4-byte aligned, or null).
template <int D, bool kClamp, int kGroups>
SAW_INT4_DEVICE void quantize_words(const typename AppendRow<D>::Values& t, const Units<kGroups>& units, uint8_t* row,
                                    FitSums (&sums)[kGroups]) {
  SAW_INT4_UNROLL
  for (int k = 0; k < AppendRow<D>::kWords; ++k) {
    const uint32_t word = quantize_word<kClamp>(t[k], units, sums);
    if (row != nullptr) dev::st_global(reinterpret_cast<uint32_t*>(row) + AppendRow<D>::word(k), word);
  }
  // Sums of (code + r) and (f + r), r the bits of the rounder, whose square is 0 modulo 2^32.
  static_assert(kRounderBits * kRounderBits == 0);
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    sums[g].total -= 8 / kGroups * AppendRow<D>::kWords * kRounderBits;
    sums[g].cross -= kRounderBits * (sums[g].s1 + sums[g].total);
  }
}

// Smallest and largest value of a group of a row's channels.
struct Range {
  float low, high;
};

template <int D, int kGroups>
SAW_INT4_DEVICE Range range_of_group(const typename AppendRow<D>::Values& t, int group) {
  constexpr int kChannels = 8 / kGroups;  // of the group in a word
  const int first = group * kChannels;
  // Bits order like floats where the sign is right: as signed integers the largest, if it is positive, as unsigned ones
  // the smallest, if it is negative. NaN wins both, so that one bad channel marks the row.
  int32_t top = INT32_MIN;
  uint32_t bottom = 0;
  SAW_INT4_UNROLL
  for (int k = 0; k < AppendRow<D>::kWords; ++k) {
    SAW_INT4_UNROLL
    for (int i = first; i < first + kChannels; i += 2) {
      const uint32_t a = dev::float_bits(t[k][i]), b = dev::float_bits(t[k][i + 1]);
      top = dev::max3(top, static_cast<int32_t>(a), static_cast<int32_t>(b));
      bottom = dev::max3(bottom, a, b);
    }
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kAppendLanes<D>; mask *= 2) {
    top = dev::max3(top, top, dev::shfl_xor(top, mask));
    bottom = dev::max3(bottom, bottom, dev::shfl_xor(bottom, mask));
  }
  Range range{dev::bits_float(bottom), dev::bits_float(static_cast<uint32_t>(top))};
  if (!dev::any(top < 0 || static_cast<int32_t>(bottom) >= 0)) return range;
  // A group of one sign.
  range = {INFINITY, -INFINITY};
  SAW_INT4_UNROLL
  for (int k = 0; k < AppendRow<D>::kWords; ++k) {
    SAW_INT4_UNROLL
    for (int i = first; i < first + kChannels; ++i)
      range = {dev::fmin_nan(range.low, t[k][i]), dev::fmax_nan(range.high, t[k][i])};
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kAppendLanes<D>; mask *= 2) {
    range.low = dev::fmin_nan(range.low, dev::shfl_xor(range.low, mask));
    range.high = dev::fmax_nan(range.high, dev::shfl_xor(range.high, mask));
  }
  return range;
}

// Stores the lane's words of one row as codes, and returns what the parameters follow from, the same in all its lanes.
// The row's values are t * unit, unit a power of two: factors that change no rounding are not spent on every value.
template <int D, int kGroups>
SAW_INT4_DEVICE OpenRow<kGroups> quantize_row(const typename AppendRow<D>::Values& t, float unit, uint8_t* row) {
  OpenRow<kGroups> open;
  open.row = row;
  const float per_unit = dev::bits_float(0x7f000000u - dev::float_bits(unit));  // 1 / unit
  Units<kGroups> units;
  bool inside = true;
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    OpenGroup& group = open.group[g];
    const Range range = range_of_group<D, kGroups>(t, g);
    const float low = dev::mul_rn(range.low, unit), high = dev::mul_rn(range.high, unit);
    group.scale = dev::f16_to_float(dev::float_to_f16(dev::div_rn(dev::sub_rn(high, low), float(kCodeMax))));
    group.offset = dev::f16_to_float(dev::float_to_f16(low));
    const float inverse = group.scale == 0.f ? 0.f : dev::div_rn(1.f, group.scale);  // a constant group has codes 0
    // Rounding is monotonous: where the smallest and the largest value round into 0 .. 15, all do.
    const float first = dev::mul_rn(dev::sub_rn(low, group.offset), inverse);
    const float last = dev::mul_rn(dev::sub_rn(high, group.offset), inverse);
    inside = inside && first >= -0.5f && last < kCodeMax + 0.5f;
    units.offset[g] = dev::mul_rn(group.offset, per_unit);
    units.inverse[g] = dev::mul_rn(inverse, unit);
  }
  FitSums sums[kGroups];
  if (dev::any(!inside))
    quantize_words<D, true>(t, units, row, sums);
  else
    quantize_words<D, false>(t, units, row, sums);
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    OpenGroup& group = open.group[g];
    group.squares_and_codes = sums[g].s2 << 16 | sums[g].s1;  // 15^2 * 256 < 2^16, 15 * 256 < 2^16
    group.total = sums[g].total;
    group.cross = sums[g].cross;
    SAW_INT4_UNROLL
    for (int mask = 1; mask < kAppendLanes<D>; mask *= 2) {
      group.squares_and_codes += dev::shfl_xor(group.squares_and_codes, mask);
      group.total += dev::shfl_xor(group.total, mask);
      group.cross += dev::shfl_xor(group.cross, mask);
    }
  }
  return open;
}

// Blocks per SM that the registers allow without spilling.
constexpr int append_blocks_per_sm(int head_dim, DType dtype) {
  return 6;
}

// A row on its way to shared memory while the one before it is computed: a lane copies what it will read itself, so
// that no barrier is needed, and no register holds it.
template <int D, DType kType>
struct AppendInput {
  static constexpr int kVectors = Channels<kType>::kVectors, kBytesPerChannel = 2 * kVectors;
  static constexpr int kSharedBytes = AppendRow<D>::kWords * kVectors * 16 * kAppendThreads;
  int64_t slot;
  uint32_t head;

  SAW_INT4_DEVICE static uint32_t at(int k, int i) {
    return dev::shared_base() + ((k * kVectors + i) * kAppendThreads + dev::thread_index()) * 16;
  }
  // pair: (token, head) in one number. Lanes past the last one read that and write nothing.
  SAW_INT4_DEVICE void fetch(const AppendParams& p, bool is_v, uint32_t pair) {
    const uint32_t pairs = static_cast<uint32_t>(p.num_tokens) * p.num_kv_heads;
    const uint32_t read = pair < pairs ? pair : pairs - 1, token = read / p.num_kv_heads;
    head = read - token * p.num_kv_heads;
    const int64_t first = token * (is_v ? p.v_token_stride : p.k_token_stride) + head * D + AppendRow<D>::lane() * 8;
    const auto* x = static_cast<const uint8_t*>(is_v ? p.v : p.k) + first * kBytesPerChannel;
    SAW_INT4_UNROLL
    for (int k = 0; k < AppendRow<D>::kWords; ++k) {
      SAW_INT4_UNROLL
      for (int i = 0; i < kVectors; ++i)
        dev::cp_async_zfill<16>(at(k, i), x + k * kAppendLanes<D> * 8 * kBytesPerChannel + 16 * i, true);
    }
    dev::cp_async_commit();
    const int64_t wanted = dev::ld_global(p.slots + token);
    slot = pair < pairs ? wanted : -1;
  }
  SAW_INT4_DEVICE void widen(typename AppendRow<D>::Values& t) const {
    dev::cp_async_wait<0>();
    SAW_INT4_UNROLL
    for (int k = 0; k < AppendRow<D>::kWords; ++k) {
      Channels<kType> channels;
      SAW_INT4_UNROLL
      for (int i = 0; i < kVectors; ++i) channels.raw[i] = dev::ld_shared<uint4>(at(k, i));
      channels.widen(t[k]);
    }
  }
};

// Transforms and quantizes one row, up to its parameters, and fetches the next.
template <int D, DType kType, int kGroups>
SAW_INT4_DEVICE OpenRow<kGroups> append_row(AppendInput<D, kType>& input, const AppendParams& p, bool is_v,
                                            uint32_t next) {
  if (dev::any(input.slot >= p.num_slots)) dev::trap();
  const int64_t first_byte = (input.slot * p.num_kv_heads + input.head) * row_bytes(D, kGroups);
  uint8_t* const row = input.slot < 0 ? nullptr : (is_v ? p.v_cache : p.k_cache) + first_byte;
  const TransformParams& tr = p.transform;
  const auto of_head = [&](const float* vectors) {
    return is_v || vectors == nullptr ? nullptr : vectors + input.head * D;
  };
  const float *const mean = of_head(tr.k_mean), *const mul = of_head(tr.k_inv_scale), *const sign = of_head(tr.k_sign);
  typename AppendRow<D>::Values t;
  input.widen(t);
  input.fetch(p, is_v, next);
  float norm = transform_row<D, kAppendLanes<D>>(t, is_v && !tr.rotate_v ? 1 : tr.rotation_order, mean, mul, sign);
  if ((dev::float_bits(norm) & 0x7fffffu) != 0) {  // no power of two
    for_channels(t, [&](float x) { return dev::mul_rn(x, norm); });
    norm = 1.f;
  }
  return quantize_row<D, kGroups>(t, norm, row);
}

// Even blocks do K, odd ones V, so that rotated and unrotated rows share an SM. A group of lanes does `rounds` rows,
// one after the other.
template <int D, DType kType, int kGroups>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(kAppendThreads, append_blocks_per_sm(D, kType))
    saw_int4_append_kernel(const AppendParams p, const int rounds) {
  constexpr int kLanes = kAppendLanes<D>, kRows = kAppendRows<D>;
  const bool is_v = dev::block_index() % 2;
  uint32_t pair = dev::block_index() / 2 * rounds * kRows + dev::thread_index() / kLanes;
  AppendInput<D, kType> input;
  input.fetch(p, is_v, pair);
  OpenRow<kGroups> mine;
  SAW_INT4_UNROLL_BY(1)
  for (int round = 0; round < rounds; ++round) {
    pair += kRows;
    const OpenRow<kGroups> open = append_row<D, kType, kGroups>(input, p, is_v, pair);
    if (AppendRow<D>::lane() == round % kLanes) mine = open;
    if (round % kLanes != kLanes - 1 && round != rounds - 1) continue;
    dev::warp_sync();  // the codes of a damaged row are overwritten
    close_row<D>(mine);
    mine.row = nullptr;
  }
  dev::cp_async_wait<0>();  // the row after the last, which nobody wants
}

}  // namespace saw_int4
