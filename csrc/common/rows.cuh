// Eight neighbouring channels of a row at a time, in any of the model's dtypes, and the Hadamard transform of a row
// whose channels lie in the lanes of a warp.
#pragma once

#include "common/device.h"
#include "params.h"

namespace saw_int4 {

// Eight 16-bit floats, fp16 or bf16.
SAW_INT4_DEVICE void widen_half(const uint4& v, bool is_fp16, float (&x)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  SAW_INT4_UNROLL
  for (int j = 0; j < 4; ++j) {
    const auto lo = static_cast<uint16_t>(words[j]), hi = static_cast<uint16_t>(words[j] >> 16);
    x[2 * j] = is_fp16 ? dev::f16_to_float(lo) : dev::bf16_to_float(lo);
    x[2 * j + 1] = is_fp16 ? dev::f16_to_float(hi) : dev::bf16_to_float(hi);
  }
}

// Eight channels as they lie in memory: fetched first, widened when needed, so that many loads are in flight.
template <DType kType>
struct Channels {
  static constexpr int kVectors = kType == DType::kFloat32 ? 2 : 1;
  uint4 raw[kVectors];

  // Channels index .. index + 7, index a multiple of 8 and the base 16-byte aligned. kWritten: of memory that the
  // same launch writes.
  template <bool kWritten = false>
  SAW_INT4_DEVICE void load(const void* base, int64_t index) {
    constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;
    const auto* p = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(base) + index * kBytes);
    SAW_INT4_UNROLL
    for (int i = 0; i < kVectors; ++i) raw[i] = kWritten ? dev::ld_global_coherent(p + i) : dev::ld_global(p + i);
  }

  SAW_INT4_DEVICE void widen(float (&x)[8]) const {
    if constexpr (kType == DType::kFloat32) {
      SAW_INT4_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        x[4 * i] = dev::bits_float(raw[i].x);
        x[4 * i + 1] = dev::bits_float(raw[i].y);
        x[4 * i + 2] = dev::bits_float(raw[i].z);
        x[4 * i + 3] = dev::bits_float(raw[i].w);
      }
    } else {
      widen_half(raw[0], kType == DType::kFloat16, x);
    }
  }
};

// x[0..7] <- channels index .. index + 7.
template <DType kType>
SAW_INT4_DEVICE void load_channels(const void* base, int64_t index, float (&x)[8]) {
  Channels<kType> channels;
  channels.load(base, index);
  channels.widen(x);
}

// Two floats as two 16-bit values, rounded to nearest even.
SAW_INT4_DEVICE uint32_t pack_pair(float lo, float hi, DType dtype) {
  return dtype == DType::kFloat16 ? dev::pack_f16x2(lo, hi) : dev::pack_bf16x2(lo, hi);
}

template <DType kType>
SAW_INT4_DEVICE void store_channels(void* base, int64_t index, const float (&x)[8]) {
  if constexpr (kType == DType::kFloat32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
    dev::st_global(p, float4{x[0], x[1], x[2], x[3]});
    dev::st_global(p + 1, float4{x[4], x[5], x[6], x[7]});
  } else {
    const uint4 v{pack_pair(x[0], x[1], kType), pack_pair(x[2], x[3], kType), pack_pair(x[4], x[5], kType),
                  pack_pair(x[6], x[7], kType)};
    dev::st_global(reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + index), v);
  }
}

// order ** -0.5, rounded to fp32: exact for even powers of two, sqrt(1/2) times such a one for odd powers.
SAW_INT4_DEVICE float hadamard_norm(int order) {
  int log2 = 0;
  while ((1 << log2) < order) ++log2;
  const float power = dev::bits_float(static_cast<uint32_t>(127 - (log2 + 1) / 2) << 23);  // 2 ** -ceil(log2 / 2)
  return log2 % 2 == 0 ? power : power * 1.41421356237309504880f;
}

// Unnormalised Hadamard transform of blocks of `order` channels; the lane holds channels lane*N .. lane*N + N - 1 of a
// row that starts at a lane divisible by order / N. Strides ascend, (lo, hi) <- (lo + hi, lo - hi): format.h's order. A
// shuffled butterfly is one FMA: +-1 * x + other rounds like the addition it is.
template <int N>
SAW_INT4_DEVICE void hadamard(float (&x)[N], int order) {
  SAW_INT4_UNROLL
  for (int stride = 1; stride < N; stride *= 2) {
    if (stride < order) {
      SAW_INT4_UNROLL
      for (int i = 0; i < N; ++i) {
        if (i & stride) continue;
        const float lo = x[i], hi = x[i + stride];
        x[i] = dev::add_rn(lo, hi);
        x[i + stride] = dev::sub_rn(lo, hi);
      }
    }
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    if (mask * N < order) {
      const float sign = dev::lane_id() & mask ? -1.f : 1.f;
      SAW_INT4_UNROLL
      for (int i = 0; i < N; ++i) x[i] = dev::fma_rn(sign, x[i], dev::shfl_xor(x[i], mask));
    }
  }
}

// Lanes that share a row: the most, up to a power of two, among which its words of 8 channels divide evenly.
constexpr int row_lanes(int head_dim, int most) {
  while (head_dim / 8 % most != 0) most /= 2;
  return most;
}

// A row of D channels spread over LANES neighbouring lanes: lane i of them has words i, i + LANES, ..., so that
// neighbours load and store neighbouring memory.
template <int D, int LANES>
struct SpreadRow {
  static_assert(D / 8 % LANES == 0);
  static constexpr int kWords = D / 8 / LANES;  // of a lane
  static constexpr int kFullOrder = D & -D;     // the largest Hadamard order that divides D
  using Values = float[kWords][8];

  SAW_INT4_DEVICE static int lane() { return dev::lane_id() % LANES; }
  SAW_INT4_DEVICE static int word(int k) { return LANES * k + lane(); }  // of the row
};

// x[k][i] <- f(x[k][i]) for all channels of the lane.
template <int WORDS, typename F>
SAW_INT4_DEVICE void for_channels(float (&x)[WORDS][8], const F& f) {
  SAW_INT4_UNROLL
  for (int k = 0; k < WORDS; ++k) {
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i) x[k][i] = f(x[k][i]);
  }
}

// (lo, hi) <- (lo + hi, lo - hi), channel by channel.
SAW_INT4_DEVICE void butterfly(float& lo, float& hi) {
  const float sum = dev::add_rn(lo, hi);
  hi = dev::sub_rn(lo, hi);
  lo = sum;
}

// The stages of a Hadamard transform that lie within words: strides 1, 2, 4, as far as they are below `order`.
template <int WORDS>
SAW_INT4_DEVICE void hadamard_in_words(float (&x)[WORDS][8], int order) {
  SAW_INT4_UNROLL
  for (int stride = 1; stride < 8; stride *= 2) {
    if (stride >= order) continue;
    SAW_INT4_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i)
        if (!(i & stride)) butterfly(x[k][i], x[k][i + stride]);
    }
  }
}

// Those between words of a lane, `first` words apart, then twice as many, ..., below `end`.
template <int WORDS>
SAW_INT4_DEVICE void hadamard_of_words(float (&x)[WORDS][8], int first, int end) {
  SAW_INT4_UNROLL
  for (int step = 1; step < WORDS; step *= 2) {
    if (step < first || step >= end) continue;
    SAW_INT4_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      if ((k & step) || k + step >= WORDS) continue;  // where D is no power of two, order stays below such a step
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) butterfly(x[k][i], x[k + step][i]);
    }
  }
}

// Unnormalised Hadamard transform of a row in SpreadRow's layout, strides ascending as format.h says.
template <int LANES, int WORDS>
SAW_INT4_DEVICE void hadamard_row(float (&x)[WORDS][8], int order) {
  hadamard_in_words(x, order);
  SAW_INT4_UNROLL
  for (int mask = 1; mask < LANES; mask *= 2) {
    if (8 * mask >= order) continue;
    const float sign = dev::lane_id() & mask ? -1.f : 1.f;
    SAW_INT4_UNROLL
    for (int k = 0; k < WORDS; ++k) {
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) x[k][i] = dev::fma_rn(sign, x[k][i], dev::shfl_xor(x[k][i], mask));
    }
  }
  hadamard_of_words(x, 1, order / (8 * LANES));
}

// x <- f(x, y) for all channels of the lane, y being the channel's entry of an fp32 vector [D], or nothing if that is
// null.
template <int D, int LANES, typename F>
SAW_INT4_DEVICE void combine(typename SpreadRow<D, LANES>::Values& x, const float* vector, const F& f) {
  if (vector == nullptr) return;
  SAW_INT4_UNROLL
  for (int k = 0; k < SpreadRow<D, LANES>::kWords; ++k) {
    float y[8];
    load_channels<DType::kFloat32>(vector, SpreadRow<D, LANES>::word(k) * 8, y);
    SAW_INT4_UNROLL
    for (int i = 0; i < 8; ++i) x[k][i] = f(x[k][i], y[i]);
  }
}

// sign * H_R((x - mean) * mul) of a row, as format.h rounds it, but for the norm of H_R: that is returned, and the
// caller multiplies by it. mean, mul, sign: fp32 [D] of the row's head, 16-byte aligned, or null.
template <int D, int LANES>
SAW_INT4_DEVICE float transform_row(typename SpreadRow<D, LANES>::Values& x, int order, const float* mean,
                                    const float* mul, const float* sign) {
  combine<D, LANES>(x, mean, [](float a, float b) { return dev::sub_rn(a, b); });
  combine<D, LANES>(x, mul, [](float a, float b) { return dev::mul_rn(a, b); });
  // The usual order as a constant: a stage that may be skipped costs moves between registers.
  if (order == SpreadRow<D, LANES>::kFullOrder)
    hadamard_row<LANES>(x, SpreadRow<D, LANES>::kFullOrder);
  else if (order > 1)
    hadamard_row<LANES>(x, order);
  combine<D, LANES>(x, sign, [](float a, float b) { return dev::mul_rn(a, b); });
  return order > 1 ? hadamard_norm(order) : 1.f;
}

}  // namespace saw_int4
