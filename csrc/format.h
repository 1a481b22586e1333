// The INT4 row format: the only C++ file that knows the layout (twin: saw_int4/format.py).
//
// One row holds one (token, KV head) of K, or of V:
//
//     [ codes: head_dim/2 bytes ][ scale: fp16 ][ offset: fp16 ]        x ~ scale * code + offset
//
// or, where the user buys accuracy with 4 more bytes, two pairs of parameters: those of group 0, the first four
// channels of every word, then those of group 1, the last four. After a rotation any half of the channels is as good as
// another; this one makes each k-step of the tensor cores see one group only. With one group rows are 4 mod 8 bytes
// long, with two 0 mod 8: a cache's shape says which it holds.
//
// Codes lie in little-endian 32-bit words of 8 channels. Channel c = 8*w + 2*i + e (i in 0..3, e in 0..1)
// is the nibble of word w at bit 16*e + 4*i: one shift and one mask, (word >> 4*i) & 0x000f000f, yields the
// channels 2i and 2i+1 of the word as a pair of 16-bit lanes, which is what a tensor-core fragment, a bf16x2
// store and a 16-bit SIMD lane all want. csrc/README.md shows the register mapping this order was chosen for.
//
// Rounding, step by step (every operation is one IEEE fp32 operation, round to nearest even, never fused):
//     t      = (float(x) - mean) * inv_scale           when the row is calibrated, else float(x)
//     t      = FWHT of each block of `order` channels: for stride = 1, 2, 4, ... < order
//                  (lo, hi) <- (lo + hi, lo - hi)       for every pair of channels `stride` apart
//              then t * float(order ** -0.5)            when rotated
//     t      = t * sign                                 when the row is calibrated (sign is +1 or -1 per channel)
// and then for each group of channels by itself, n = D / groups of them:
//     low    = min t,  unit = (max t - low) / 3967          so that 256 units are a step of the codes, 15.5 the range
//     f      = round_half_even((t - low) * (3967 / (max t - low)))         the product is not rounded before: one FMA
//     c      = the first of 0, 64, 128 with the least  sum e^2,  e = (f + c) mod 256 - 128
//     code   = (f + c) div 256
// The range leaves half a step of play, and of three ways to lay the grid over the row the one that rounds it best is
// taken: 9 to 12 % less squared error than the grid from min t to max t, for integer arithmetic on one rounding. No
// value lies outside 0 .. 15. Then scale and offset are fitted to the codes by least squares. In integers, so that no
// order of summation matters, S1 = sum code, S2 = sum code^2, F = sum f, X = sum code * f:
//     a      = float(n * X - S1 * F) / float(n * S2 - S1 * S1)
//     b      = (float(F) - a * float(S1)) / float(n)
//     scale  = fp16(unit * a),  offset = fp16(low + unit * b), a zero of either sign stored as +0
// Where fp16(unit * 256) is 0 (a constant group) codes and scale are 0 and offset is fp16(low). A row whose t, or whose
// scale or offset (any of them), is not finite stores NaN for all parameters and codes 0: the damage is seen, and stays
// in that row.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SAW_INT4_HD __host__ __device__
#else
#define SAW_INT4_HD
#endif

namespace saw_int4 {

inline constexpr int kFormatVersion = 2;
inline constexpr int kCodesPerWord = 8;
inline constexpr int kCodeMax = 15;
inline constexpr int kUnitsPerStep = 256;      // rounding and fit count in 1/256 of a step of the codes
inline constexpr int kUnitsOfRange = 3967;     // from the smallest to the largest value of a group
inline constexpr int kShifts = 3;              // ways to lay the grid over a group
inline constexpr int kMaxGroups = 2;           // of a row
inline constexpr int kParamBytes = 4;          // of a group: fp16 scale, fp16 offset
inline constexpr uint16_t kNanParam = 0x7e00;  // the fp16 NaN that marks a damaged row

// Bytes of codes, and of a whole row. head_dim: a multiple of 16.
SAW_INT4_HD constexpr int code_bytes(int head_dim) {
  return head_dim / 2;
}
SAW_INT4_HD constexpr int row_bytes(int head_dim, int groups) {
  return code_bytes(head_dim) + groups * kParamBytes;
}

// Groups of a row of so many bytes; 0 when this head_dim has no such row.
SAW_INT4_HD constexpr int groups_of_row(int64_t bytes, int head_dim) {
  for (int groups = 1; groups <= kMaxGroups; ++groups)
    if (bytes == row_bytes(head_dim, groups)) return groups;
  return 0;
}

// Byte positions of a group's parameters inside a row.
SAW_INT4_HD constexpr int scale_byte(int head_dim, int group) {
  return code_bytes(head_dim) + group * kParamBytes;
}
SAW_INT4_HD constexpr int offset_byte(int head_dim, int group) {
  return scale_byte(head_dim, group) + 2;
}

// Where channel c lies: 32-bit word of the row, and bit inside that word.
SAW_INT4_HD constexpr int word_of_channel(int c) {
  return c / kCodesPerWord;
}
SAW_INT4_HD constexpr int bit_of_channel(int c) {
  return 16 * (c & 1) + 4 * ((c >> 1) & 3);
}

// How far the grid is shifted, in units: by half a step at most, and then the largest value has code 15 still.
SAW_INT4_HD constexpr int grid_shift(int i) {
  return i * kUnitsPerStep / (2 * (kShifts - 1));
}
static_assert((kUnitsOfRange + grid_shift(kShifts - 1)) / kUnitsPerStep == kCodeMax);

// The group whose parameters a channel takes.
SAW_INT4_HD constexpr int group_of_channel(int c, int groups) {
  return c % kCodesPerWord * groups / kCodesPerWord;
}

}  // namespace saw_int4
