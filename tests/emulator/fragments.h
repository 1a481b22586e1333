// Which lane and register holds which matrix element, as the PTX ISA manual draws it for mma.m16n8k16 with 16-bit
// elements and fp32 accumulators, and for movmatrix.m8n8.trans.b16. group = lane / 4, member = lane % 4.
//
//     A 16x16, 4 registers of 2:  row = group (+ 8 in registers 1, 3),  column = 2 * member + half (+ 8 in 2, 3)
//     B 16x8,  2 registers of 2:  row = 2 * member + half (+ 8 in register 1),  column = group
//     C 16x8,  4 floats:          row = group (+ 8 in 2, 3),            column = 2 * member + (index & 1)
//
// Accumulation: products are exact; they and C are summed in double and rounded to fp32 once. Hardware sums in an
// unspecified order with at least fp32-like precision, so results may differ in the last bits: tests need tolerance.
#pragma once

#include <cstdint>

#include "emulator/half.h"

namespace saw_int4::emulator {

enum class Element { kHalf, kBFloat16 };

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};
struct MmaResult {
  float d[4];
};

template <Element kElement>
float element(uint32_t pair, int half) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * half));
  return kElement == Element::kHalf ? half_to_float(bits) : bf16_to_float(bits);
}

template <Element kElement>
void mma_m16n8k16(const MmaOperands* in, MmaResult* out) {
  float a[16][16], b_t[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        a[group + 8 * (r & 1)][2 * member + half + 8 * (r >> 1)] = element<kElement>(in[lane].a[r], half);
      }
      for (int r = 0; r < 2; ++r) b_t[group][2 * member + half + 8 * r] = element<kElement>(in[lane].b[r], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
      double sum = in[lane].c[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k] * b_t[column][k]);
      out[lane].d[i] = static_cast<float>(sum);
    }
  }
}

// Lane l holds elements 2*(l%4) and 2*(l%4)+1 of row l/4 of an 8x8 matrix, and gets those of its transpose.
inline void movmatrix_trans(const uint32_t* in, uint32_t* out) {
  for (int lane = 0; lane < 32; ++lane) {
    out[lane] = 0;
    for (int half = 0; half < 2; ++half) {
      const int row = 2 * (lane % 4) + half, column = lane / 4;  // of the source
      const uint32_t bits = in[row * 4 + column / 2] >> (16 * (column & 1)) & 0xffffu;
      out[lane] |= bits << (16 * half);
    }
  }
}

}  // namespace saw_int4::emulator
