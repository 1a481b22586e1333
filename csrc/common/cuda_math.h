// Bits, 16-bit floats, and fp32 arithmetic whose rounding is stated. CUDA room of common/device.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda_thread.h"

namespace saw_int4::dev {

// (x & mask) | bits in one LOP3.
SAW_INT4_DEVICE uint32_t lop3_and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(x), "r"(mask), "r"(bits));
  return d;
}
// Byte i of the result is byte (selector >> 4*i) & 7 of b:a (a holds bytes 0..3).
SAW_INT4_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
// c + the four products of the bytes of a and b, all unsigned.
SAW_INT4_DEVICE uint32_t dot_u8x4(uint32_t a, uint32_t b, uint32_t c) {
  return __dp4a(a, b, c);
}
// The same of signed bytes.
SAW_INT4_DEVICE uint32_t dot_s8x4(uint32_t a, uint32_t b, uint32_t c) {
  return __dp4a(static_cast<int32_t>(a), static_cast<int32_t>(b), static_cast<int32_t>(c));
}
// The largest of three: one instruction from sm_90 on.
SAW_INT4_DEVICE int32_t max3(int32_t a, int32_t b, int32_t c) {
  return __vimax3_s32(a, b, c);
}
SAW_INT4_DEVICE uint32_t max3(uint32_t a, uint32_t b, uint32_t c) {
  return __vimax3_u32(a, b, c);
}
// The whole product. In assembly: else the compiler widens a for all that depends on it.
SAW_INT4_DEVICE uint64_t mul_wide(uint32_t a, uint32_t b) {
  uint64_t d;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(d) : "r"(a), "r"(b));
  return d;
}
// High 32 bits of the product.
SAW_INT4_DEVICE uint32_t mul_hi(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}

SAW_INT4_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
SAW_INT4_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}

// fp16 and bf16 travel as bits. To 16 bits: round to nearest even; NaN stays NaN.
SAW_INT4_DEVICE float f16_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
SAW_INT4_DEVICE uint16_t float_to_f16(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
SAW_INT4_DEVICE float bf16_to_float(uint16_t h) {
  return __uint_as_float(static_cast<uint32_t>(h) << 16);
}
SAW_INT4_DEVICE uint16_t float_to_bf16(float f) {
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
SAW_INT4_DEVICE uint32_t pack_f16x2(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
SAW_INT4_DEVICE uint32_t pack_bf16x2(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
// a * b + c in both fp16 halves, rounded once.
SAW_INT4_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// One IEEE operation each, round to nearest even, never contracted.
SAW_INT4_DEVICE float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
SAW_INT4_DEVICE float sub_rn(float a, float b) {
  return __fsub_rn(a, b);
}
SAW_INT4_DEVICE float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
SAW_INT4_DEVICE float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
SAW_INT4_DEVICE float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
// The other operand when one is NaN.
SAW_INT4_DEVICE float fmin(float a, float b) {
  return fminf(a, b);
}
SAW_INT4_DEVICE float fmax(float a, float b) {
  return fmaxf(a, b);
}
// NaN when either operand is.
SAW_INT4_DEVICE float fmin_nan(float a, float b) {
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
SAW_INT4_DEVICE float fmax_nan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
SAW_INT4_DEVICE bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

// About 2 ulp, subnormals flushed. exp2(-inf) = 0, log2(0) = -inf.
SAW_INT4_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SAW_INT4_DEVICE float rcp_approx(float x) {  // rcp(inf) = 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SAW_INT4_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace saw_int4::dev
