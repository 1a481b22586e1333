// Eight 4-bit codes of a word to the fp16 operands of the tensor cores.
//
// format.h puts channels 2i and 2i+1 of a word at bits 4i of its two halves, so one mask isolates a pair. One shift
// brings pairs 2 and 3 down to where 0 and 1 are. No integer is ever converted.
//   code_pairs: the isolated nibbles are fp16 numbers already, subnormal ones, which tensor cores take as they are:
//   code * 2^-24 where the nibble lies at bit 0, 16 times that at bit 4. A shift and 4 LOP3. The caller multiplies the
//   sums by kCodesPerUnit, and divides its factors of odd pairs by 16.
//   centred_codes: code - 8, exactly, so that sums over many tokens grow by what the values differ, not by a mean that
//   the truncating accumulators of the tensor cores would drag down. OR-ing 0x6400 = 1024.0 below the mantissa makes
//   1024 + code or 1024 + 16 * code, and an HFMA2 the rest: 4 more instructions.
#pragma once

#include "common/device.h"

namespace saw_int4 {

inline constexpr float kCodesPerUnit = 1 << 24;  // 1 / the smallest fp16
inline constexpr float kOddPairFactor = 16.f;    // pairs 1 and 3 of a word come multiplied by it
inline constexpr float kCodeCentre = 8.f;

// Mask of the nibbles at bit 4*nibble of the two halves of a word, nibble 0 or 1.
SAW_INT4_DEVICE constexpr uint32_t nibbles_at(int nibble) {
  return nibble == 0 ? 0x000f000fu : 0x00f000f0u;
}

// pairs[i]: channels 2i and 2i + 1 of word w, as code / kCodesPerUnit * (i odd ? kOddPairFactor : 1).
SAW_INT4_DEVICE void code_pairs(uint32_t w, uint32_t (&pairs)[4]) {
  const uint32_t high = w >> 8;
  SAW_INT4_UNROLL
  for (int i = 0; i < 4; ++i) pairs[i] = (i < 2 ? w : high) & nibbles_at(i % 2);
}

// The nibbles at bit 4*nibble of the two halves of w, nibble 0 or 1, as code - kCodeCentre.
SAW_INT4_DEVICE uint32_t centred_pair(uint32_t w, int nibble) {
  const uint32_t biased = dev::lop3_and_or(w, nibbles_at(nibble), 0x64006400u);
  return dev::fma_f16x2(biased, nibble == 0 ? 0x3c003c00u : 0x2c002c00u,  // 1 * x - 1032
                        nibble == 0 ? 0xe408e408u : 0xd480d480u);         // x / 16 - 72
}

// pairs[i]: the nibbles at bit 4i of the two halves of w, as code - kCodeCentre.
SAW_INT4_DEVICE void centred_codes(uint32_t w, uint32_t (&pairs)[4]) {
  const uint32_t high = w >> 8;
  SAW_INT4_UNROLL
  for (int i = 0; i < 4; ++i) pairs[i] = centred_pair(i < 2 ? w : high, i % 2);
}

}  // namespace saw_int4
