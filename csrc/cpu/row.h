// One row of D channels on the CPU: load, transform, quantize, dequantize, store. The bit-exact specification.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>

#include "format.h"
#include "params.h"

namespace saw_int4 {

inline void load_row(const void* base, int64_t index, DType dtype, int head_dim, float* t) {
  for (int c = 0; c < head_dim; ++c) {
    if (dtype == DType::kFloat32)
      t[c] = static_cast<const float*>(base)[index + c];
    else if (dtype == DType::kFloat16)
      t[c] = static_cast<const c10::Half*>(base)[index + c];
    else
      t[c] = static_cast<const c10::BFloat16*>(base)[index + c];
  }
}

inline void store_row(void* base, int64_t index, DType dtype, int head_dim, const float* t) {
  for (int c = 0; c < head_dim; ++c) {
    if (dtype == DType::kFloat32)
      static_cast<float*>(base)[index + c] = t[c];
    else if (dtype == DType::kFloat16)
      static_cast<c10::Half*>(base)[index + c] = t[c];
    else
      static_cast<c10::BFloat16*>(base)[index + c] = t[c];
  }
}

inline void transform_row(float* t, int head_dim, int order, const float* mean, const float* mul) {
  for (int c = 0; c < head_dim; ++c) {
    if (mean != nullptr) t[c] = t[c] - mean[c];
    if (mul != nullptr) t[c] = t[c] * mul[c];
  }
  if (order <= 1) return;
  for (int stride = 1; stride < order; stride *= 2) {
    for (int c = 0; c < head_dim; ++c) {
      if (c & stride) continue;
      const float lo = t[c], hi = t[c + stride];
      t[c] = lo + hi;
      t[c + stride] = lo - hi;
    }
  }
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(order)));
  for (int c = 0; c < head_dim; ++c) t[c] = t[c] * norm;
}

inline void quantize_row(const float* t, int head_dim, uint8_t* row) {
  float low = t[0], high = t[0];
  bool finite = true;
  for (int c = 0; c < head_dim; ++c) {
    low = t[c] < low ? t[c] : low;
    high = t[c] > high ? t[c] : high;
    finite = finite && std::isfinite(t[c]);
  }
  const c10::Half scale16 = (high - low) / 15.f;
  const c10::Half offset16 = low + 0.f;
  const float scale = scale16, offset = offset16;
  std::memset(row, 0, code_bytes(head_dim));
  uint16_t params[2] = {scale16.x, offset == 0.f ? uint16_t{0} : offset16.x};
  if (!finite || !std::isfinite(scale) || !std::isfinite(offset)) {
    params[0] = params[1] = kNanParam;
  } else if (scale != 0.f) {
    const float inverse = 1.f / scale;
    for (int w = 0; w < head_dim / kCodesPerWord; ++w) {
      uint32_t word = 0;
      for (int c = w * kCodesPerWord; c < (w + 1) * kCodesPerWord; ++c) {
        float x = (t[c] - offset) * inverse;
        x = x < 0.f ? 0.f : x > 15.f ? 15.f : x;
        word |= static_cast<uint32_t>(std::nearbyint(x)) << bit_of_channel(c);
      }
      std::memcpy(row + 4 * w, &word, 4);
    }
  }
  std::memcpy(row + scale_byte(head_dim), params, 4);
}

inline void dequantize_row(const uint8_t* row, int head_dim, float* t) {
  c10::Half params[2];
  std::memcpy(params, row + scale_byte(head_dim), 4);
  const float scale = params[0], offset = params[1];
  for (int c = 0; c < head_dim; ++c) {
    uint32_t word;
    std::memcpy(&word, row + 4 * word_of_channel(c), 4);
    t[c] = scale * static_cast<float>((word >> bit_of_channel(c)) & 15u) + offset;
  }
}

}  // namespace saw_int4
