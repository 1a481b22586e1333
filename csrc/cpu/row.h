// One row of D channels: load, transform, quantize, dequantize, store. The bit-exact specification, N lanes at a
// time: format.h states every rounding. Included once per kernels_cpu_*.cpp, after simd.h.
#pragma once

namespace saw_int4::SAW_INT4_ISA {

SAW_INT4_INLINE void load_row(const void* base, int64_t index, DType dtype, int head_dim, float* t) {
  if (dtype == DType::kFloat32) {
    __builtin_memcpy(t, static_cast<const float*>(base) + index, 4 * head_dim);
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(base) + index;
  for (int c = 0; c < head_dim; c += N) {
    const H h = load<H>(x + c);
    store(t + c, dtype == DType::kFloat16 ? from_half(h) : from_bfloat16(h));
  }
}

SAW_INT4_INLINE void store_row(void* base, int64_t index, DType dtype, int head_dim, const float* t) {
  if (dtype == DType::kFloat32) {
    __builtin_memcpy(static_cast<float*>(base) + index, t, 4 * head_dim);
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(base) + index;
  for (int c = 0; c < head_dim; c += N) {
    const F x = load<F>(t + c);
    store(y + c, dtype == DType::kFloat16 ? to_half(x) : to_bfloat16(x));
  }
}

// (lo, hi) <- (lo + hi, lo - hi) for lanes kStride apart.
template <int kStride, int... kLane>
SAW_INT4_INLINE F butterfly(F v, std::integer_sequence<int, kLane...>) {
  const U negate = {((kLane & kStride) ? 0x80000000u : 0u)...};
  return (F)((U)v ^ negate) + swap_lanes<kStride>(v);
}
template <int kStride>
SAW_INT4_INLINE F butterfly(F v) {
  return butterfly<kStride>(v, std::make_integer_sequence<int, N>{});
}

SAW_INT4_INLINE void hadamard_row(float* t, int head_dim, int order) {
  if (order <= 1) return;
  for (int c = 0; c < head_dim; c += N) {
    F v = butterfly<1>(load<F>(t + c));
    if (order > 2) v = butterfly<2>(v);
    if constexpr (N > 4) {
      if (order > 4) v = butterfly<4>(v);
    }
    if constexpr (N > 8) {
      if (order > 8) v = butterfly<8>(v);
    }
    store(t + c, v);
  }
  for (int stride = N; stride < order; stride *= 2) {
    for (int block = 0; block < head_dim; block += 2 * stride) {
      for (int c = block; c < block + stride; c += N) {
        const F lo = load<F>(t + c), hi = load<F>(t + c + stride);
        store(t + c, lo + hi);
        store(t + c + stride, lo - hi);
      }
    }
  }
  const F norm = splat(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(order))));
  for (int c = 0; c < head_dim; c += N) store(t + c, load<F>(t + c) * norm);
}

// t <- sign * H_R((t - mean) * mul); mean, mul and sign may be null.
SAW_INT4_INLINE void transform_row(float* t, int head_dim, int order, const float* mean, const float* mul,
                                   const float* sign) {
  if (mean != nullptr) {
    for (int c = 0; c < head_dim; c += N) store(t + c, load<F>(t + c) - load<F>(mean + c));
  }
  if (mul != nullptr) {
    for (int c = 0; c < head_dim; c += N) store(t + c, load<F>(t + c) * load<F>(mul + c));
  }
  hadamard_row(t, head_dim, order);
  if (sign != nullptr) {
    for (int c = 0; c < head_dim; c += N) store(t + c, load<F>(t + c) * load<F>(sign + c));
  }
}

// Least-squares parameters for codes that are already chosen; sums as in format.h.
SAW_INT4_INLINE void fit_params(int64_t n, int64_t s1, int64_t s2, int64_t total, int64_t cross, float low, float unit,
                                uint16_t* params) {
  const int64_t spread = n * s2 - s1 * s1;
  if (spread == 0) return;
  const float a = static_cast<float>(n * cross - s1 * total) / static_cast<float>(spread);
  const float b = (static_cast<float>(total) - a * static_cast<float>(s1)) / static_cast<float>(n);
  params[0] = to_half(unit * a);
  params[1] = to_half(low + unit * b);
}

SAW_INT4_INLINE bool is_finite_half(uint16_t x) {
  return (x & 0x7c00u) != 0x7c00u;
}

// How the lanes of vectors of N channels belong to groups: a vector has lanes of every group in the same places, or,
// where N is less than a word, vectors of one group and of the other take turns (kinds).
template <int kGroups>
struct Grouped {
  static constexpr int kKinds = N < kCodesPerWord ? kGroups : 1;
  static constexpr bool kMixed = kGroups > kKinds;

  template <int... kLane>
  SAW_INT4_INLINE I in_group(int group, std::integer_sequence<int, kLane...>) {
    const I groups = {group_of_channel(kLane % kCodesPerWord, kGroups)...};
    return groups == group;
  }
  // Of vectors of each kind, one group's lanes; the other lanes become `neutral`.
  template <typename V>
  SAW_INT4_INLINE V lanes_of(const V (&v)[kKinds], int group, V neutral) {
    if constexpr (!kMixed) return v[kKinds == 1 ? 0 : group];
    return in_group(group, std::make_integer_sequence<int, N>{}) ? v[0] : neutral;
  }
  // The other way: every lane gets what its group has.
  SAW_INT4_INLINE F spread(const float (&x)[kGroups], int kind) {
    if constexpr (!kMixed) return splat(x[kind]);
    return in_group(0, std::make_integer_sequence<int, N>{}) ? splat(x[0]) : splat(x[kGroups - 1]);
  }
};

// Codes of 8 channels, a byte each, to their word: even channels to the low half, odd ones to the high half.
SAW_INT4_INLINE uint32_t pack_word(uint64_t bytes) {
  uint64_t even = bytes & 0x000f000f000f000fu, odd = (bytes >> 8) & 0x000f000f000f000fu;
  even = (even | even >> 12) & 0x000000ff000000ffu;
  odd = (odd | odd >> 12) & 0x000000ff000000ffu;
  even = (even | even >> 24) & 0xffffu;
  odd = (odd | odd >> 24) & 0xffffu;
  return static_cast<uint32_t>(even | odd << 16);
}

// t [D], transformed -> row [row_bytes(D, kGroups)]. codes [D]: scratch.
template <int kGroups>
SAW_INT4_INLINE void quantize_row(const float* t, int head_dim, uint8_t* codes, uint8_t* row) {
  using Lanes = Grouped<kGroups>;
  constexpr int kKinds = Lanes::kKinds;
  F lows[kKinds], highs[kKinds];
  for (int kind = 0; kind < kKinds; ++kind) lows[kind] = highs[kind] = load<F>(t + kind * N);
  I damaged{};
  for (int first = 0; first < head_dim; first += kKinds * N) {
    for (int kind = 0; kind < kKinds; ++kind) {
      const F x = load<F>(t + first + kind * N);
      lows[kind] = min(x, lows[kind]);
      highs[kind] = max(x, highs[kind]);
      damaged |= ((U)x & 0x7f800000u) == 0x7f800000u;
    }
  }
  bool damage = any_lane(damaged);
  uint16_t params[kGroups][2];
  float offsets[kGroups], units[kGroups], inverses[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    const float low = lane_min(Lanes::lanes_of(lows, g, splat(INFINITY)));
    const float range = lane_max(Lanes::lanes_of(highs, g, splat(-INFINITY))) - low;
    offsets[g] = low;
    units[g] = range / kUnitsOfRange;
    params[g][0] = to_half(units[g] * kUnitsPerStep);
    params[g][1] = to_half(low);
    inverses[g] = params[g][0] == 0 ? 0.f : kUnitsOfRange / range;  // a constant group has codes 0
    damage |= range == INFINITY;
  }
  if (!damage) {
    const auto sum = [](const I(&x)[kKinds], int g)
                         __attribute__((always_inline)) { return lane_sum(Lanes::lanes_of(x, g, I{})); };
    const auto in_units = [&](int c, int kind) __attribute__((always_inline)) {
      return round_product(load<F>(t + c) - Lanes::spread(offsets, kind), Lanes::spread(inverses, kind));
    };
    // With s, the low byte of f as a signed number: e = s where the shift is 128, s -+ 128 where it is 0 (for s >= 0,
    // s < 0), and s - 64 where it is 64, but s + 192 for s < -64. So differences of sum e^2 need no products.
    static_assert(kUnitsPerStep == 256 && kShifts == 3 && grid_shift(1) == 64 && grid_shift(2) == 128);
    I sizes[kKinds] = {}, parts[kKinds] = {}, below[kKinds] = {};  // sums of |s|, s and min(s + 64, 0)
    for (int first = 0; first < head_dim; first += kKinds * N) {
      for (int kind = 0; kind < kKinds; ++kind) {
        const I s = (I)((U)in_units(first + kind * N, kind) << 24) >> 24, shifted = s + 64;
        sizes[kind] += s < 0 ? -s : s;
        parts[kind] += s;
        below[kind] += shifted < 0 ? shifted : I{};
      }
    }
    float shifts[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      const int64_t n = head_dim / kGroups;
      const int64_t with_0 = 128 * 128 * n - 256 * sum(sizes, g);  // sum e^2 less that with 128
      const int64_t with_64 = 64 * 64 * n - 128 * sum(parts, g) + 512 * sum(below, g);
      shifts[g] = with_0 <= with_64 && with_0 <= 0 ? 0.f : with_64 <= 0 ? 64.f : 128.f;
    }
    I s1[kKinds] = {}, s2[kKinds] = {}, total[kKinds] = {}, cross[kKinds] = {};
    for (int first = 0; first < head_dim; first += kKinds * N) {
      for (int kind = 0; kind < kKinds; ++kind) {
        const int c = first + kind * N;
        const I f = in_units(c, kind);
        const I code = (I)((U)(f + __builtin_convertvector(Lanes::spread(shifts, kind), I)) / kUnitsPerStep);
        store(codes + c, __builtin_convertvector((U)code, B));
        s1[kind] += code;
        s2[kind] += code * code;
        total[kind] += f;
        cross[kind] += code * f;
      }
    }
    for (int g = 0; g < kGroups; ++g)
      fit_params(head_dim / kGroups, sum(s1, g), sum(s2, g), sum(total, g), sum(cross, g), offsets[g], units[g],
                 params[g]);
  }
  for (int g = 0; g < kGroups; ++g) damage |= !is_finite_half(params[g][0]) || !is_finite_half(params[g][1]);
  if (damage) __builtin_memset(codes, 0, static_cast<uint32_t>(head_dim));
  for (int g = 0; g < kGroups; ++g) {
    if (damage) params[g][0] = params[g][1] = kNanParam;
    if ((params[g][1] & 0x7fffu) == 0) params[g][1] = 0;  // one zero, or equal rows could differ in bytes
  }
  for (int w = 0; w < head_dim / kCodesPerWord; ++w) {
    const uint32_t word = pack_word(load<uint64_t>(codes + kCodesPerWord * w));
    store(row + 4 * w, word);
  }
  __builtin_memcpy(row + scale_byte(head_dim, 0), params, sizeof(params));
}

// The codes of N consecutive channels from c, a multiple of N, in the low bits of their lanes.
template <int... kLane>
SAW_INT4_INLINE U channel_codes(const uint8_t* row, int c, std::integer_sequence<int, kLane...>) {
  const U first = splat(load<uint32_t>(row + 4 * word_of_channel(c)));
  if constexpr (N < kCodesPerWord) {
    const U low = {static_cast<uint32_t>(bit_of_channel(kLane))...};
    const U high = {static_cast<uint32_t>(bit_of_channel(kLane + N))...};
    return first >> (c % kCodesPerWord == 0 ? low : high);
  } else {
    const U bits = {static_cast<uint32_t>(bit_of_channel(kLane % kCodesPerWord))...};
    if constexpr (N == kCodesPerWord) return first >> bits;
    const U second = splat(load<uint32_t>(row + 4 * word_of_channel(c + kCodesPerWord)));
    const I in_first = {(kLane < kCodesPerWord ? -1 : 0)...};
    return (in_first ? first : second) >> bits;
  }
}

// row [row_bytes(D, kGroups)] -> t [D], still transformed.
template <int kGroups>
SAW_INT4_INLINE void dequantize_row(const uint8_t* row, int head_dim, float* t) {
  using Lanes = Grouped<kGroups>;
  float scales[kGroups], offsets[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    scales[g] = from_half(load<uint16_t>(row + scale_byte(head_dim, g)));
    offsets[g] = from_half(load<uint16_t>(row + offset_byte(head_dim, g)));
  }
  for (int first = 0; first < head_dim; first += Lanes::kKinds * N) {
    for (int kind = 0; kind < Lanes::kKinds; ++kind) {
      const int c = first + kind * N;
      const U words = channel_codes(row, c, std::make_integer_sequence<int, N>{});
      store(t + c, Lanes::spread(scales, kind) * codes(words) + Lanes::spread(offsets, kind));
    }
  }
}

}  // namespace saw_int4::SAW_INT4_ISA
