// Which lane and register holds which matrix element, as the PTX ISA manual draws it for mma.m16n8k16 with 16-bit
// elements and fp32 accumulators, and for movmatrix.m8n8.trans.b16. group = lane / 4, member = lane % 4.
//
//     A 16x16, 4 registers of 2:  row = group (+ 8 in registers 1, 3),  column = 2 * member + half (+ 8 in 2, 3)
//     B 16x8,  2 registers of 2:  row = 2 * member + half (+ 8 in register 1),  column = group
//     C 16x8,  4 floats:          row = group (+ 8 in 2, 3),            column = 2 * member + (index & 1)
//
// Accumulation is no better than the hardware's, of which NVIDIA promises little and measurements tell more (Fasi et
// al., "Numerical behavior of NVIDIA tensor cores", 2021): eight exact products and the accumulator at a time are
// aligned to the largest of them, cut off below its 24th bit, summed, and the sum cut to fp32, always towards zero. A
// subnormal operand is aligned as if it were the smallest normal number (seen on an H100).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

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

using Floats [[gnu::vector_size(16)]] = float;  // four columns of B
using Ints [[gnu::vector_size(16)]] = int32_t;

inline Ints magnitude(const Floats& x) {
  return std::bit_cast<Ints>(x) & 0x7fffffff;
}

// What |x| counts for when products are aligned.
template <Element kElement>
float aligned_as(float x) {
  return kElement == Element::kHalf && x != 0.f ? std::max(std::fabs(x), 0x1p-14f) : std::fabs(x);
}

// sum + a[0] b[0] + ... + a[7] b[7] for one row of A and four columns of B, whose rows are two Floats apart; sizes:
// what they count for.
inline Floats add_products(const Floats& sum, const float* a, const Floats* b, const float* a_sizes,
                           const Floats* b_sizes) {
  constexpr int kFloor = 27 << 23;  // 2^-100: what is aligned to less is cut off, and the powers below stay normal
  Floats terms[9];
  terms[8] = sum;
  Ints largest = magnitude(sum);
  for (int k = 0; k < 8; ++k) {
    terms[k] = a[k] * b[2 * k];  // exact: 11 by 11 bits
    const Ints size = magnitude(a_sizes[k] * b_sizes[2 * k]);
    largest = size > largest ? size : largest;
  }
  Ints exponent = largest & 0x7f800000;
  const Ints special = exponent == 0x7f800000;
  exponent = exponent < kFloor ? Ints{} + kFloor : exponent;
  const auto unit = std::bit_cast<Floats>(exponent - (23 << 23));
  const auto per_unit = std::bit_cast<Floats>((Ints{} + (277 << 23)) - exponent);
  Ints total{};
  Floats plain{};
  for (const Floats& term : terms) {
    total += __builtin_convertvector(special != 0 ? Floats{} : term * per_unit, Ints);
    plain += term;
  }
  const Ints sign = total >> 31;
  Ints size = (total ^ sign) - sign;
  for (int bit = 24; bit < 28; ++bit) size = size >> bit != 0 ? size & -(2 << (bit - 24)) : size;
  const Floats cut = __builtin_convertvector((size ^ sign) - sign, Floats) * unit;
  return special != 0 ? plain : cut;
}

template <Element kElement>
void mma_m16n8k16(const MmaOperands* in, MmaResult* out) {
  float a[16][16], b[16][8], c[16][8], a_sizes[16][16], b_sizes[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) {
        a[group + 8 * (r & 1)][2 * member + half + 8 * (r >> 1)] = element<kElement>(in[lane].a[r], half);
      }
      for (int r = 0; r < 2; ++r) b[2 * member + half + 8 * r][group] = element<kElement>(in[lane].b[r], half);
    }
    for (int i = 0; i < 4; ++i) c[group + 8 * (i >> 1)][2 * member + (i & 1)] = in[lane].c[i];
  }
  for (int i = 0; i < 16; ++i) {
    std::ranges::transform(a[i], a_sizes[i], aligned_as<kElement>);
    std::ranges::transform(b[i], b_sizes[i], aligned_as<kElement>);
  }
  Floats columns[16][2], column_sizes[16][2], sums[16][2];
  std::memcpy(columns, b, sizeof b);
  std::memcpy(column_sizes, b_sizes, sizeof b_sizes);
  std::memcpy(sums, c, sizeof c);
  for (int row = 0; row < 16; ++row) {
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; k += 8) {
        sums[row][half] =
            add_products(sums[row][half], a[row] + k, &columns[k][half], a_sizes[row] + k, &column_sizes[k][half]);
      }
    }
  }
  std::memcpy(c, sums, sizeof c);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) out[lane].d[i] = c[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
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

// Eight 16-bit values of a matrix in shared memory; lanes 0-7 hold the runs of rows 0-7 of B (kRowsOfB), or of its
// columns' first eight values, lanes 8-15 the others.
struct Run {
  uint16_t values[8];
};
struct BFragment {
  uint32_t b[2];
};
template <bool kRowsOfB>
void fragment_of_runs(const Run* in, BFragment* out) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 2; ++r) {
      out[lane].b[r] = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = 2 * (lane % 4) + half, column = lane / 4;
        const uint32_t bits = kRowsOfB ? in[8 * r + row].values[column] : in[8 * r + column].values[row];
        out[lane].b[r] |= bits << (16 * half);
      }
    }
  }
}

}  // namespace saw_int4::emulator
