// K and V of T new tokens -> INT4 rows at their slots: t = sign * H_R((x - mu) / s), then 4-bit codes and their
// fitted scale and offset, byte for byte as format.h states and csrc/cpu computes it (nothing is contracted).
//
// 4 lanes per row of one (token, head), 2 where 4 do not divide it: lane i takes words i, i + 4, ... of it, and stores
// the same words of codes. Many rows of head_dim 64 have a lane each. A rotation over a whole row of 128 or 256 starts
// with neighbouring words in a lane, so that every stage lies in a lane, and changes over halfway through shared
// memory; others shuffle.
//
// The grid walks over the tokens in fronts, K and V in turn where there is work for more than one, so that what is read
// at a time lies together (DRAM), the next row is on its way to shared memory meanwhile, and a lane keeps its head,
// whose calibration waits in shared memory. Parameters are fitted last, one row per lane: divisions and 64-bit sums
// then cost one row's worth per group of lanes.
//
// Bound: HBM. A head_dim 256 row of K and V moves 2 * (512 + 132) bytes, 95 cycles of an H100 SM's share = 380 issue
// slots; README.md counts what the warp spends on four of them.
// Assumes: k, v 16-byte aligned with token strides of whole 16 bytes; of equal slots words may mix.
#pragma once

#include "common/rows.cuh"
#include "format.h"

namespace saw_int4 {

inline constexpr int kAppendThreads = 64;

// A block does `heads` neighbouring heads of as many tokens as its rows are for, then of those `front` tokens on.
struct AppendPlan {
  int blocks = 0;
  int heads = 0;
  int front = 0;      // tokens that the grid does at a time
  bool both = false;  // K and V of each token, in turn; otherwise even blocks do K, odd ones V
};

template <int D>
inline constexpr int kAppendLanes = row_lanes(D, 4);  // of a row
template <int D>
inline constexpr int kManyAppendLanes = D == 64 ? 1 : kAppendLanes<D>;  // of one of many rows
template <int kLanes>
inline constexpr int kAppendRows = kAppendThreads / kLanes;  // (token, head) pairs per block and round

// Adding 1.5 * 2^23 rounds a small float to an integer, half to even, and leaves it in the low bits.
inline constexpr float kRounder = 12582912.f;

// A group of channels whose codes are chosen and whose parameters are not: what they are fitted from. Sums are of
// format.h's fit: of the codes, their squares, f, and code * f.
struct OpenGroup {
  float low = 0.f, unit = 0.f;
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
  float scale = dev::mul_rn(open.unit, float(kUnitsPerStep)), offset = open.low;
  const int64_t s1 = open.squares_and_codes & 0xffffu, s2 = open.squares_and_codes >> 16;
  const int64_t total = open.total, cross = open.cross;
  const int64_t spread = n * s2 - s1 * s1;
  if (spread != 0) {
    const float a = dev::div_rn(static_cast<float>(n * cross - s1 * total), static_cast<float>(spread));
    const float b =
        dev::div_rn(dev::sub_rn(static_cast<float>(total), dev::mul_rn(a, static_cast<float>(s1))), float(n));
    scale = dev::mul_rn(open.unit, a);
    offset = dev::add_rn(open.low, dev::mul_rn(open.unit, b));
  }
  finite = finite && dev::is_finite(open.unit);
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

// 0xff in those bytes whose channels, of the codes that start at bits first, first + 8, .., first + 24, are the
// group's.
constexpr uint32_t bytes_of_group(int first, int group, int groups) {
  uint32_t bytes = 0;
  for (int byte = 0; byte < 4; ++byte)
    if (group_of_channel(channel_at_bit(first + 8 * byte), groups) == group) bytes |= 0xffu << 8 * byte;
  return bytes;
}

// Eight channels in units above the smallest, f of format.h, 16 bits each: in pair[2 * h + j] the channels whose codes
// start at bits 4 * h + 16 * j and 4 * h + 16 * j + 8. The nibbles h of a word's bytes are then bytes of two pairs.
struct FineWord {
  uint32_t pair[4];

  SAW_INT4_DEVICE void round(const float (&t)[8], const float (&low)[8], const float (&per_unit)[8]) {
    uint32_t bits[8];
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i)
      bits[i] = dev::float_bits(dev::fma_rn(dev::sub_rn(t[i], low[i]), per_unit[i], kRounder));
    SAW_INT4_UNROLL
    for (int p = 0; p < 4; ++p) {
      const int bit = 4 * (p / 2) + 16 * (p % 2);
      pair[p] = dev::prmt(bits[channel_at_bit(bit)], bits[channel_at_bit(bit + 8)], 0x5410);
    }
  }
  // Of the channels of nibbles h: their low bytes, parts of a step, or their high ones, whole steps.
  SAW_INT4_DEVICE uint32_t parts(int h) const { return dev::prmt(pair[2 * h], pair[2 * h + 1], 0x6420); }
  SAW_INT4_DEVICE uint32_t steps(int h) const { return dev::prmt(pair[2 * h], pair[2 * h + 1], 0x7531); }
};
template <int D, int kLanes>
using FineRow = FineWord[SpreadRow<D, kLanes>::kWords];

// What the shifts of the grid cost a group: sums of squared rounding errors, by number of the shift.
struct ShiftErrors {
  uint32_t sum[kShifts] = {};

  // parts: low bytes of f of four channels; counted: 0xff in those that count.
  SAW_INT4_DEVICE void add(uint32_t parts, uint32_t counted) {
    static_assert(kUnitsPerStep == 256 && kShifts == 3 && grid_shift(1) == 64 && grid_shift(2) == 128);
    // (part + shift) mod 256 - 128 as a signed byte. With 128 it is the byte itself, with 0 its top bit flips, with 64
    // the bit below flips, and the top one where that was 0.
    const uint32_t errors[kShifts] = {parts ^ 0x80808080u, parts ^ (parts << 1 & 0x80808080u) ^ 0xc0c0c0c0u, parts};
    SAW_INT4_UNROLL
    for (int i = 0; i < kShifts; ++i) sum[i] = dev::dot_s8x4(errors[i], errors[i] & counted, sum[i]);
  }
  // The shift that costs the lanes of a row least; the same in all of them.
  template <int kLanes>
  SAW_INT4_DEVICE uint32_t best() {
    SAW_INT4_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) {
      SAW_INT4_UNROLL
      for (int i = 0; i < kShifts; ++i) sum[i] += dev::shfl_xor(sum[i], mask);
    }
    uint32_t shift = grid_shift(0), least = sum[0];
    SAW_INT4_UNROLL
    for (int i = 1; i < kShifts; ++i) {
      shift = sum[i] < least ? grid_shift(i) : shift;
      least = sum[i] < least ? sum[i] : least;
    }
    return shift;
  }
};

// Smallest and largest value of a group of a row's channels.
struct Range {
  float low, high;
};

template <int D, int kLanes, int kGroups>
SAW_INT4_DEVICE Range range_of_group(const typename SpreadRow<D, kLanes>::Values& t, int group) {
  constexpr int kChannels = 8 / kGroups;  // of the group in a word
  const int first = group * kChannels;
  // Bits order like floats where the sign is right: as signed integers the largest, if it is positive, as unsigned ones
  // the smallest, if it is negative. NaN wins both, so that one bad channel marks the row.
  int32_t top = INT32_MIN;
  uint32_t bottom = 0;
  SAW_INT4_UNROLL
  for (int k = 0; k < SpreadRow<D, kLanes>::kWords; ++k) {
    SAW_INT4_UNROLL
    for (int i = first; i < first + kChannels; i += 2) {
      const uint32_t a = dev::float_bits(t[k][i]), b = dev::float_bits(t[k][i + 1]);
      top = dev::max3(top, static_cast<int32_t>(a), static_cast<int32_t>(b));
      bottom = dev::max3(bottom, a, b);
    }
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    top = dev::max3(top, top, dev::shfl_xor(top, mask));
    bottom = dev::max3(bottom, bottom, dev::shfl_xor(bottom, mask));
  }
  Range range{dev::bits_float(bottom), dev::bits_float(static_cast<uint32_t>(top))};
  if (!dev::any(top < 0 || static_cast<int32_t>(bottom) >= 0)) return range;
  // A group of one sign.
  range = {INFINITY, -INFINITY};
  SAW_INT4_UNROLL
  for (int k = 0; k < SpreadRow<D, kLanes>::kWords; ++k) {
    SAW_INT4_UNROLL
    for (int i = first; i < first + kChannels; ++i)
      range = {dev::fmin_nan(range.low, t[k][i]), dev::fmax_nan(range.high, t[k][i])};
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    range.low = dev::fmin_nan(range.low, dev::shfl_xor(range.low, mask));
    range.high = dev::fmax_nan(range.high, dev::shfl_xor(range.high, mask));
  }
  return range;
}

// store(word, codes) for the lane's words of one row; returns what the parameters follow from, the same in all its
// lanes. The row's values are t * scale, scale a power of two: factors that change no rounding are not spent on every
// value.
template <int D, int kLanes, int kGroups, typename Store>
SAW_INT4_DEVICE OpenRow<kGroups> quantize_row(const typename SpreadRow<D, kLanes>::Values& t, float scale,
                                              const Store& store) {
  constexpr int kWords = SpreadRow<D, kLanes>::kWords;
  OpenRow<kGroups> open;
  float low[8], per_unit[8];  // of the channels of a word
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    OpenGroup& group = open.group[g];
    const Range values = range_of_group<D, kLanes, kGroups>(t, g);
    group.low = dev::mul_rn(values.low, scale);
    const float range = dev::sub_rn(dev::mul_rn(values.high, scale), group.low);
    group.unit = dev::div_rn(range, float(kUnitsOfRange));
    const bool constant = (dev::float_to_f16(dev::mul_rn(group.unit, float(kUnitsPerStep))) & 0x7fffu) == 0;
    const float inverse = constant ? 0.f : dev::div_rn(float(kUnitsOfRange), range);  // a constant group has codes 0
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (group_of_channel(i, kGroups) != g) continue;
      low[i] = values.low;
      per_unit[i] = dev::mul_rn(inverse, scale);
    }
  }
  FineRow<D, kLanes> fine;
  ShiftErrors errors[kGroups];
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    fine[k].round(t[k], low, per_unit);
    SAW_INT4_UNROLL
    for (int h = 0; h < 2; ++h) {
      SAW_INT4_UNROLL
      for (int g = 0; g < kGroups; ++g) errors[g].add(fine[k].parts(h), bytes_of_group(4 * h, g, kGroups));
    }
  }
  uint32_t shift[kGroups];
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) shift[g] = errors[g].template best<kLanes>();
  // Channels that share a pair are of the first group and of the last.
  static_assert(bytes_of_group(0, 0, 2) == 0x00ff00ffu && bytes_of_group(4, 0, 2) == 0x00ff00ffu);
  const uint32_t shifts = shift[0] | shift[kGroups - 1] << 16;
  uint32_t s1[kGroups] = {}, s2[kGroups] = {}, parts[kGroups] = {}, cross[kGroups] = {};
  SAW_INT4_UNROLL
  for (int k = 0; k < kWords; ++k) {
    SAW_INT4_UNROLL
    for (int p = 0; p < 4; ++p) fine[k].pair[p] += shifts;
    uint32_t nibbles[2];
    SAW_INT4_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t codes = nibbles[h] = fine[k].steps(h), rest = fine[k].parts(h);
      SAW_INT4_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t own = bytes_of_group(4 * h, g, kGroups), ones = own & 0x01010101u;
        s1[g] = dev::dot_u8x4(codes, ones, s1[g]);
        s2[g] = dev::dot_u8x4(codes, codes & own, s2[g]);
        parts[g] = dev::dot_u8x4(rest, ones, parts[g]);
        cross[g] = dev::dot_u8x4(codes, rest & own, cross[g]);
      }
    }
    store(SpreadRow<D, kLanes>::word(k), nibbles[0] | nibbles[1] << 4);
  }
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    OpenGroup& group = open.group[g];
    group.squares_and_codes = s2[g] << 16 | s1[g];  // 15^2 * 256 < 2^16, 15 * 256 < 2^16
    // f + shift = 256 * code + part
    group.total = kUnitsPerStep * s1[g] + parts[g] - 8 / kGroups * kWords * shift[g];
    group.cross = kUnitsPerStep * s2[g] + cross[g] - shift[g] * s1[g];
    SAW_INT4_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) {
      group.squares_and_codes += dev::shfl_xor(group.squares_and_codes, mask);
      group.total += dev::shfl_xor(group.total, mask);
      group.cross += dev::shfl_xor(group.cross, mask);
    }
  }
  return open;
}

// Blocks per SM that the registers allow without spilling.
template <int D, int kLanes, DType kType, bool kCalibrated>
inline constexpr int kAppendBlocks = [] {
  constexpr int kWords = SpreadRow<D, kLanes>::kWords;
  constexpr bool kBf16 = kType == DType::kBFloat16;
  if (kWords <= 2) return 12;
  if (kWords <= 5) return kBf16 && !kCalibrated ? 10 : 8;
  return kWords < 8 || kBf16 ? 6 : 4;
}();

// A calibrated block's share of shared memory for calibrations: few heads, or blocks that share an SM would be fewer.
inline constexpr int kCalibrationBytes = 12 * 1024;

// Whether a rotation over the whole row moves it to other lanes halfway.
template <int D, int kLanes>
inline constexpr bool kRelayed =
    kLanes == 4 && SpreadRow<D, kLanes>::kFullOrder == D && SpreadRow<D, kLanes>::kWords >= 4;

// A block's shared memory, in pieces of 16 bytes: of each row its words, of each head of a calibrated block the halves
// of the words of mean, factor and sign. Lanes with a row each would touch as many lines as there are lanes with every
// access: there a warp reads and writes its rows together, whose codes and addresses lie here, too.
template <int D, int kLanes, DType kType>
struct AppendShared {
  using Row = SpreadRow<D, kLanes>;
  static constexpr bool kTogether = kLanes == 1;
  static constexpr int kVectors = Channels<kType>::kVectors;
  static constexpr int kPlane = D / 8 * 16;  // a piece of each word
  static constexpr int kRowsBytes = kAppendRows<kLanes> * kVectors * kPlane;
  static constexpr int kCodesBytes = D / 2 + 4;  // of a row: so that rows start in different banks
  static constexpr int kInputBytes = kRowsBytes + (kTogether ? kAppendRows<kLanes> * (16 + kCodesBytes) : 0);
  static constexpr int kHeadBytes = 3 * 2 * kPlane;  // of a calibration

  // Neighbouring lanes, of one row or the next, take words 1, or kWords, apart: neither meets a bank conflict.
  SAW_INT4_DEVICE static uint32_t place(int word, int row) {
    if (D % 64 != 0) return word * 16;
    return (word ^ (kRelayed<D, kLanes> ? word / Row::kWords : 0) ^ kLanes * (row & (8 / kLanes - 1))) * 16;
  }
  SAW_INT4_DEVICE static uint32_t input(int row, int word, int vector) {
    return dev::shared_base() + (row * kVectors + vector) * kPlane + place(word, row);
  }
  // Of rows that a warp moves together: where they come from and go to, null for nowhere, and their codes.
  SAW_INT4_DEVICE static uint32_t source(int row) { return dev::shared_base() + kRowsBytes + row * 16; }
  SAW_INT4_DEVICE static uint32_t target(int row) { return source(row) + 8; }
  SAW_INT4_DEVICE static uint32_t codes(int row) { return source(kAppendRows<kLanes>) + row * kCodesBytes; }
  SAW_INT4_DEVICE static uint32_t calibration(int head, int vector, int word, int half) {
    return dev::shared_base() + kInputBytes + head * kHeadBytes + (2 * vector + half) * kPlane + place(word, head);
  }
};

SAW_INT4_DEVICE void st_shared_address(uint32_t at, const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  dev::st_shared(at, uint2{static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)});
}
SAW_INT4_DEVICE uint8_t* ld_shared_address(uint32_t at) {
  const auto x = dev::ld_shared<uint2>(at);
  return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(x.y) << 32 | x.x);
}

// Of rows that a warp moves together: f(row of the block, word) for every word of them, one a lane and turn.
template <int D, typename F>
SAW_INT4_DEVICE void for_words_together(const F& f) {
  constexpr int kRowWords = D / kCodesPerWord, kRowsAtATime = 32 / kRowWords;
  const int first = dev::warp_id() * 32 + dev::lane_id() / kRowWords;
  SAW_INT4_UNROLL
  for (int k = 0; k < kRowWords; ++k) f(first + k * kRowsAtATime, dev::lane_id() % kRowWords);
}

// The word of the row that is the lane's k-th.
template <int D, int kLanes>
SAW_INT4_DEVICE int lane_word(int k, bool neighbouring) {
  using Row = SpreadRow<D, kLanes>;
  return neighbouring ? Row::kWords * Row::lane() + k : Row::word(k);
}

// A row on its way to shared memory while the one before it is computed: no register holds it.
template <int D, int kLanes, DType kType>
struct AppendInput {
  using Row = SpreadRow<D, kLanes>;
  using Shared = AppendShared<D, kLanes, kType>;
  static constexpr int kVectors = Shared::kVectors, kBytesPerChannel = 2 * kVectors;
  uint32_t head;
  int64_t slot;

  // Past the last token nothing is read: the grid's last rows would all ask for the same memory.
  SAW_INT4_DEVICE void fetch(const AppendParams& p, bool is_v, uint32_t token) {
    const bool exists = token < p.num_tokens;
    const int64_t first = token * (is_v ? p.v_token_stride : p.k_token_stride) + head * D + Row::lane() * 8;
    const auto* x = static_cast<const uint8_t*>(is_v ? p.v : p.k) + first * kBytesPerChannel;
    if constexpr (Shared::kTogether) {
      st_shared_address(Shared::source(dev::thread_index()), exists ? x : nullptr);
      dev::warp_sync();  // and no lane needs its last row's input
      for_words_together<D>([&](int row, int word) {
        const uint8_t* from = ld_shared_address(Shared::source(row));
        SAW_INT4_UNROLL
        for (int i = 0; i < kVectors; ++i)
          dev::cp_async_zfill<16>(Shared::input(row, word, i), from + (word * kVectors + i) * 16, from != nullptr);
      });
    } else {
      const int row = dev::thread_index() / kLanes;
      SAW_INT4_UNROLL
      for (int k = 0; k < Row::kWords; ++k) {
        SAW_INT4_UNROLL
        for (int i = 0; i < kVectors; ++i)
          dev::cp_async_zfill<16>(Shared::input(row, Row::word(k), i), x + k * kLanes * 8 * kBytesPerChannel + 16 * i,
                                  exists);
      }
    }
    dev::cp_async_commit();
    slot = exists ? dev::ld_global(p.slots + token) : -1;
  }
  SAW_INT4_DEVICE void widen(typename Row::Values& t, bool neighbouring) const {
    const int row = dev::thread_index() / kLanes;
    SAW_INT4_UNROLL
    for (int k = 0; k < Row::kWords; ++k) {
      Channels<kType> channels;
      SAW_INT4_UNROLL
      for (int i = 0; i < kVectors; ++i)
        channels.raw[i] = dev::ld_shared<uint4>(Shared::input(row, lane_word<D, kLanes>(k, neighbouring), i));
      channels.widen(t[k]);
    }
  }
};

// To shared memory, the calibration of the block's heads. Signs are multiplied by the norm of the rotation: as exact as
// one after the other.
template <int D, int kLanes, DType kType>
SAW_INT4_DEVICE void load_calibration(const AppendParams& p, uint32_t first_head, int heads, float norm) {
  constexpr int kHalves = D / 4, kMostHeads = kCalibrationBytes / AppendShared<D, kLanes, kType>::kHeadBytes;
  constexpr int kTurns = (kMostHeads * kHalves + kAppendThreads - 1) / kAppendThreads;
  const int left = p.num_kv_heads - static_cast<int>(first_head), halves = (heads < left ? heads : left) * kHalves;
  const float* const vectors[3] = {p.transform.k_mean, p.transform.k_inv_scale, p.transform.k_sign};
  float4 x[kTurns][3];
  SAW_INT4_UNROLL
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kAppendThreads + dev::thread_index();
    SAW_INT4_UNROLL
    for (int v = 0; v < 3; ++v)
      if (i < halves) x[turn][v] = dev::ld_global(reinterpret_cast<const float4*>(vectors[v] + first_head * D) + i);
  }
  SAW_INT4_UNROLL
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kAppendThreads + dev::thread_index(), half = i % kHalves;
    if (i >= halves) continue;
    float4& sign = x[turn][2];
    sign = {dev::mul_rn(sign.x, norm), dev::mul_rn(sign.y, norm), dev::mul_rn(sign.z, norm), dev::mul_rn(sign.w, norm)};
    SAW_INT4_UNROLL
    for (int v = 0; v < 3; ++v)
      dev::st_shared(AppendShared<D, kLanes, kType>::calibration(i / kHalves, v, half / 2, half % 2), x[turn][v]);
  }
  dev::block_sync();
}

// t <- f(t, y), y being the channels' entries of a vector of the calibration.
template <int D, int kLanes, DType kType, typename F>
SAW_INT4_DEVICE void calibrate(typename SpreadRow<D, kLanes>::Values& t, int head, int vector, bool neighbouring,
                               const F& f) {
  SAW_INT4_UNROLL
  for (int k = 0; k < SpreadRow<D, kLanes>::kWords; ++k) {
    SAW_INT4_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* const x = t[k] + 4 * half;
      const auto y = dev::ld_shared<float4>(
          AppendShared<D, kLanes, kType>::calibration(head, vector, lane_word<D, kLanes>(k, neighbouring), half));
      x[0] = f(x[0], y.x), x[1] = f(x[1], y.y), x[2] = f(x[2], y.z), x[3] = f(x[3], y.w);
    }
  }
}

// Hadamard transform of whole rows, from lanes with neighbouring words to SpreadRow's layout, through the place where
// the rows' input was: half of each word at a time.
template <int D, int kLanes, DType kType>
SAW_INT4_DEVICE void hadamard_relayed(typename SpreadRow<D, kLanes>::Values& t) {
  constexpr int kWords = SpreadRow<D, kLanes>::kWords;
  using Shared = AppendShared<D, kLanes, kType>;
  const int row = dev::thread_index() / kLanes;
  hadamard_in_words(t, D);
  hadamard_of_words(t, 1, kWords);
  SAW_INT4_UNROLL
  for (int half = 0; half < 2; ++half) {
    dev::warp_sync();
    SAW_INT4_UNROLL
    for (int k = 0; k < kWords; ++k) {
      const float* const x = t[k] + 4 * half;
      dev::st_shared(Shared::input(row, lane_word<D, kLanes>(k, true), 0), float4{x[0], x[1], x[2], x[3]});
    }
    dev::warp_sync();
    SAW_INT4_UNROLL
    for (int k = 0; k < kWords; ++k) {
      float* const x = t[k] + 4 * half;
      const auto y = dev::ld_shared<float4>(Shared::input(row, lane_word<D, kLanes>(k, false), 0));
      x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    }
  }
  dev::warp_sync();
  hadamard_of_words(t, kWords / kLanes, kWords);
}

template <int D, int kLanes, DType kType, int kGroups, bool kCalibrated>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(kAppendThreads, (kAppendBlocks<D, kLanes, kType, kCalibrated>))
    saw_int4_append_kernel(const AppendParams p, const AppendPlan plan) {
  using Row = SpreadRow<D, kLanes>;
  using Shared = AppendShared<D, kLanes, kType>;
  const TransformParams& tr = p.transform;
  const uint32_t row_of_block = dev::thread_index() / kLanes, heads = plan.heads, tokens = kAppendRows<kLanes> / heads;
  const uint32_t block = plan.both ? dev::block_index() : dev::block_index() / 2;
  const uint32_t columns = (p.num_kv_heads + heads - 1) / heads, first_head = block % columns * heads;
  uint32_t first_token = block / columns * tokens;  // of the block's next row
  uint32_t head_of_block = row_of_block % heads, token = first_token + row_of_block / heads;
  if (row_of_block >= heads * tokens || first_head + head_of_block >= p.num_kv_heads)  // of no row
    head_of_block = 0, token = p.num_tokens;
  AppendInput<D, kLanes, kType> input;
  input.head = first_head + head_of_block;
  bool is_v = !plan.both && dev::block_index() % 2;
  input.fetch(p, is_v, token);

  const float norm = tr.rotation_order > 1 ? hadamard_norm(tr.rotation_order) : 1.f;
  const bool exact = (dev::float_bits(norm) & 0x7fffffu) == 0;  // a power of two: changes no rounding
  if (kCalibrated && !is_v) load_calibration<D, kLanes, kType>(p, first_head, heads, exact ? 1.f : norm);

  OpenRow<kGroups> mine;
  SAW_INT4_UNROLL_BY(1)
  for (int step = 0; first_token < p.num_tokens; ++step) {
    if (dev::any(input.slot >= p.num_slots)) dev::trap();
    const int64_t first_byte = (input.slot * p.num_kv_heads + input.head) * row_bytes(D, kGroups);
    uint8_t* const row = input.slot < 0 ? nullptr : (is_v ? p.v_cache : p.k_cache) + first_byte;
    const bool calibrated = kCalibrated && !is_v, rotated = tr.rotation_order > 1 && (!is_v || tr.rotate_v);
    const bool next_is_v = plan.both != is_v;
    if (is_v || !plan.both) token += plan.front, first_token += plan.front;

    typename Row::Values t;
    dev::cp_async_wait<0>();
    if (Shared::kTogether) dev::warp_sync();
    const auto centre_and_balance = [&](bool neighbouring) {
      if (!calibrated) return;
      calibrate<D, kLanes, kType>(t, head_of_block, 0, neighbouring,
                                  [](float a, float b) { return dev::sub_rn(a, b); });
      calibrate<D, kLanes, kType>(t, head_of_block, 1, neighbouring,
                                  [](float a, float b) { return dev::mul_rn(a, b); });
    };
    if (kRelayed<D, kLanes> && rotated && tr.rotation_order == D) {
      dev::warp_sync();
      input.widen(t, true);
      centre_and_balance(true);
      hadamard_relayed<D, kLanes, kType>(t);
      input.fetch(p, next_is_v, token);
    } else {
      input.widen(t, false);
      input.fetch(p, next_is_v, token);
      centre_and_balance(false);
      // The usual order as a constant: a stage that may be skipped costs moves between registers.
      if (rotated && !kRelayed<D, kLanes> && tr.rotation_order == Row::kFullOrder)
        hadamard_row<kLanes>(t, Row::kFullOrder);
      else if (rotated)
        hadamard_row<kLanes>(t, tr.rotation_order);
    }
    if (calibrated)
      calibrate<D, kLanes, kType>(t, head_of_block, 2, false, [](float a, float b) { return dev::mul_rn(a, b); });
    else if (rotated && !exact)
      for_channels(t, [&](float x) { return dev::mul_rn(x, norm); });
    OpenRow<kGroups> open =
        quantize_row<D, kLanes, kGroups>(t, rotated && exact ? norm : 1.f, [&](int word, uint32_t codes) {
          if (Shared::kTogether)
            dev::st_shared(Shared::codes(row_of_block) + word * 4, codes);
          else if (row != nullptr)
            dev::st_global(reinterpret_cast<uint32_t*>(row) + word, codes);
        });
    open.row = row;
    if constexpr (Shared::kTogether) {
      st_shared_address(Shared::target(row_of_block), row);
      dev::warp_sync();
      for_words_together<D>([&](int of_row, int word) {
        auto* const to = reinterpret_cast<uint32_t*>(ld_shared_address(Shared::target(of_row)));
        const auto codes = dev::ld_shared<uint32_t>(Shared::codes(of_row) + word * 4);
        dev::st_global_if(to != nullptr, to + word, codes);
      });
    }
    is_v = next_is_v;

    if (Row::lane() == step % kLanes) mine = open;
    if (step % kLanes != kLanes - 1 && first_token < p.num_tokens) continue;
    dev::warp_sync();  // the codes of a damaged row are overwritten
    close_row<D>(mine);
    mine.row = nullptr;
  }
  dev::cp_async_wait<0>();  // the row after the last, which nobody wants
}

}  // namespace saw_int4
