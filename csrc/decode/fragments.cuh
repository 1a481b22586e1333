// Eight 4-bit codes of a word to the fp16 operands of the tensor cores.
//
// format.h puts channels 2i and 2i+1 of a word at bits 4i of its two halves, so one mask isolates a pair; OR-ing
// 0x6400 = 1024.0 below an fp16's mantissa makes a number of it: 1024 + code when the nibble lies at bit 0, 1024 +
// 16*code at bit 4. One shift brings the other two pairs down. No integer is ever converted.
//   biased_codes:  1 shift + 4 LOP3. The caller takes the 1024 out of the sum and divides its factors of odd pairs
//   by 16. centred_codes: and 4 HFMA2 to code - 8, exactly: sums over many tokens then grow by what the values differ,
//   not by
//                  a bias that the truncating accumulators of the tensor cores would drag down.
#pragma once

#include "common/device.h"

namespace saw_int4 {

inline constexpr float kCodeBias = 1024.f;
inline constexpr float kOddPairFactor = 16.f;  // pairs 1 and 3 of a word come multiplied by it
inline constexpr float kCodeCentre = 8.f;

// The nibbles at bit 4*nibble of the two halves of w, nibble 0 or 1, as kCodeBias + code * (kOddPairFactor for nibble
// 1).
SAW_INT4_DEVICE uint32_t biased_pair(uint32_t w, int nibble) {
  return dev::lop3_and_or(w, nibble == 0 ? 0x000f000fu : 0x00f000f0u, 0x64006400u);
}

// pairs[i]: channels 2i and 2i + 1 of word w, as kCodeBias + code * (i odd ? kOddPairFactor : 1).
SAW_INT4_DEVICE void biased_codes(uint32_t w, uint32_t (&pairs)[4]) {
  const uint32_t high = w >> 8;
  SAW_INT4_UNROLL
  for (int i = 0; i < 4; ++i) pairs[i] = biased_pair(i < 2 ? w : high, i % 2);
}

// The nibbles at bit 4*nibble of the two halves of w, nibble 0 or 1, as code - kCodeCentre.
SAW_INT4_DEVICE uint32_t centred_pair(uint32_t w, int nibble) {
  const uint32_t biased = biased_pair(w, nibble);
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
