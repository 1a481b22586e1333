// fp16 and bf16 as bits, in integer arithmetic: the emulator must not depend on what the host CPU has.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace saw_int4::emulator {

inline float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

// Round to nearest even; every NaN becomes the canonical one, as cvt.rn.bf16.f32 does.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  // The exponent's bias differs by 112; subnormals come out right because the multiplication normalises them.
  const float magnitude = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.f ? 0x7f800000u : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | (bits & 0x8000u) << 16);
}

// Round to nearest even; overflow to infinity; every NaN becomes the canonical one, as cvt.rn.f16.f32 does.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above
  if (magnitude < 0x38800000u) {                       // below 2^-14: a multiple of 2^-24
    // Adding 0.5 puts the unit in the last place at 2^-24, so that the fp32 addition does the rounding.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

// a * b + c, rounded once.
inline uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(half_to_float(a)) * half_to_float(b), addend = half_to_float(c);  // exact
  double sum = product + addend;
  if (!std::isfinite(sum)) return float_to_half(static_cast<float>(sum));
  const double back = sum - product, lost = (product - (sum - back)) + (addend - back);
  if (lost != 0 && std::signbit(lost) != std::signbit(sum)) sum = std::nextafter(sum, 0.0);
  // To fp32 by rounding to odd, which makes the second rounding, to fp16, as good as one from the exact sum.
  auto single = static_cast<float>(sum);
  if (std::fabs(static_cast<double>(single)) > std::fabs(sum)) single = std::nextafter(single, 0.f);
  if (lost != 0 || single != sum) single = std::bit_cast<float>(std::bit_cast<uint32_t>(single) | 1u);
  return float_to_half(single);
}

}  // namespace saw_int4::emulator
