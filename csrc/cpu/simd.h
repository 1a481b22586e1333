// N fp32 lanes of the instruction set that the including file was compiled for. Included once per kernels_cpu_*.cpp,
// after that file has set SAW_INT4_ISA (a namespace name) and the compiler's target. Nothing here contracts a
// product and a sum by itself: fma() is explicit, and where a cache byte depends on it, in round_product(), format.h
// asks for it.
#pragma once

#define SAW_INT4_INLINE static inline __attribute__((always_inline))

namespace saw_int4::SAW_INT4_ISA {

#if defined(SAW_INT4_AVX512)
inline constexpr int N = 16;
inline constexpr int kAccumulators = 16;  // vectors kept in registers by the P.V loop
inline constexpr int kMaxRows = 8;        // query rows that share one pass over the codes
#elif defined(SAW_INT4_AVX2)
inline constexpr int N = 8;
inline constexpr int kAccumulators = 8;
inline constexpr int kMaxRows = 4;
#else
inline constexpr int N = 4;
inline constexpr int kAccumulators = 8;
inline constexpr int kMaxRows = 4;
#endif

typedef float F __attribute__((vector_size(4 * N)));
typedef int32_t I __attribute__((vector_size(4 * N)));
typedef uint32_t U __attribute__((vector_size(4 * N)));
typedef uint16_t H __attribute__((vector_size(2 * N)));
typedef uint8_t B __attribute__((vector_size(N)));

template <typename V>
SAW_INT4_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
SAW_INT4_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

#if defined(SAW_INT4_AVX512)
SAW_INT4_INLINE F splat(float x) {
  return (F)_mm512_set1_ps(x);
}
SAW_INT4_INLINE U splat(uint32_t x) {
  return (U)_mm512_set1_epi32(static_cast<int>(x));
}
SAW_INT4_INLINE F fma(F a, F b, F c) {
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
SAW_INT4_INLINE F min(F a, F b) {
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
}  // a < b ? a : b
SAW_INT4_INLINE F max(F a, F b) {
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
}  // a > b ? a : b
// The low 4 bits of every lane as a float: a look-up that needs no mask and no conversion.
SAW_INT4_INLINE F codes(U w) {
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return (F)_mm512_permutexvar_ps((__m512i)w, table);
}
SAW_INT4_INLINE F from_half(H h) {
  return (F)_mm512_cvtph_ps((__m256i)h);
}
SAW_INT4_INLINE H to_half(F x) {
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(SAW_INT4_AVX2)
SAW_INT4_INLINE F splat(float x) {
  return (F)_mm256_set1_ps(x);
}
SAW_INT4_INLINE U splat(uint32_t x) {
  return (U)_mm256_set1_epi32(static_cast<int>(x));
}
SAW_INT4_INLINE F fma(F a, F b, F c) {
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
SAW_INT4_INLINE F min(F a, F b) {
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
}
SAW_INT4_INLINE F max(F a, F b) {
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
}
SAW_INT4_INLINE F codes(U w) {
  return __builtin_convertvector((I)(w & 15u), F);
}
SAW_INT4_INLINE F from_half(H h) {
  return (F)_mm256_cvtph_ps((__m128i)h);
}
SAW_INT4_INLINE H to_half(F x) {
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
SAW_INT4_INLINE F splat(float x) {
  return F{x, x, x, x};
}
SAW_INT4_INLINE U splat(uint32_t x) {
  return U{x, x, x, x};
}
SAW_INT4_INLINE F fma(F a, F b, F c) {
  return a * b + c;
}
SAW_INT4_INLINE F min(F a, F b) {
  return a < b ? a : b;
}
SAW_INT4_INLINE F max(F a, F b) {
  return a > b ? a : b;
}
SAW_INT4_INLINE F codes(U w) {
  return __builtin_convertvector((I)(w & 15u), F);
}
SAW_INT4_INLINE F from_half(H h) {
  const U bits = __builtin_convertvector(h, U), magnitude = bits & 0x7fffu;
  const F subnormal = __builtin_convertvector((I)magnitude, F) * splat(0x1p-24f);
  const U normal = (magnitude << 13) + 0x38000000u, special = (magnitude << 13) | 0x7f800000u;
  const U value = magnitude < 0x400u ? (U)subnormal : (magnitude >= 0x7c00u ? special : normal);
  return (F)(value | (bits & 0x8000u) << 16);
}
SAW_INT4_INLINE H to_half(F x) {
  H h{};
  for (int l = 0; l < N; ++l) h[l] = c10::detail::fp16_ieee_from_fp32_value(x[l]);
  return h;
}
#endif

// round_half_even(a * b), the product not rounded before, |a * b| < 2^22. Adding 1.5 * 2^23 (2^52 to a double, which
// holds the product of two floats) rounds to an integer and leaves that in the low bits.
SAW_INT4_INLINE I round_product(F a, F b) {
#if defined(SAW_INT4_AVX512) || defined(SAW_INT4_AVX2)
  const F rounder = splat(12582912.f);
  return (I)fma(a, b, rounder) - (I)rounder;
#else
  typedef double Wide __attribute__((vector_size(8 * N)));
  const Wide product = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  return __builtin_convertvector((product + 0x1.8p52) - 0x1.8p52, I);
#endif
}

SAW_INT4_INLINE F from_bfloat16(H h) {
  return (F)(__builtin_convertvector(h, U) << 16);
}

SAW_INT4_INLINE H to_bfloat16(F x) {
  const U bits = (U)x;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((U)(x == x ? rounded : splat(0x7fc0u)), H);
}

SAW_INT4_INLINE uint16_t to_half(float x) {
  return to_half(splat(x))[0];
}
SAW_INT4_INLINE float from_half(uint16_t h) {
  return from_half(H{h})[0];
}

// Lanes exchanged with those kStride away.
template <int kStride, typename V, int... kLane>
SAW_INT4_INLINE V swap_lanes(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStride)...);
}
template <int kStride, typename V>
SAW_INT4_INLINE V swap_lanes(V v) {
  return swap_lanes<kStride>(v, std::make_integer_sequence<int, N>{});
}

// Reductions over the lanes, in a fixed order: halves, quarters, and so on.
SAW_INT4_INLINE float lane_sum(F v) {
  if constexpr (N > 8) v += swap_lanes<8>(v);
  if constexpr (N > 4) v += swap_lanes<4>(v);
  v += swap_lanes<2>(v);
  return v[0] + v[1];
}
SAW_INT4_INLINE float lane_max(F v) {
  if constexpr (N > 8) v = max(v, swap_lanes<8>(v));
  if constexpr (N > 4) v = max(v, swap_lanes<4>(v));
  v = max(v, swap_lanes<2>(v));
  return v[0] > v[1] ? v[0] : v[1];
}
SAW_INT4_INLINE float lane_min(F v) {
  if constexpr (N > 8) v = min(v, swap_lanes<8>(v));
  if constexpr (N > 4) v = min(v, swap_lanes<4>(v));
  v = min(v, swap_lanes<2>(v));
  return v[0] < v[1] ? v[0] : v[1];
}
// Four lanes' sum must fit 32 bits.
SAW_INT4_INLINE int64_t lane_sum(I v) {
  if constexpr (N > 8) v += swap_lanes<8>(v);
  if constexpr (N > 4) v += swap_lanes<4>(v);
  return (int64_t{v[0]} + v[1]) + (int64_t{v[2]} + v[3]);
}
SAW_INT4_INLINE bool any_lane(I v) {
  return lane_sum(v & 1) != 0;
}

// exp(x) for x <= 0, within 2 ulp; 0 below -87 (also for -inf), NaN for NaN.
SAW_INT4_INLINE F exp_nonpositive(F x) {
  const F magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const F shifted = fma(x, splat(1.44269504f), magic);
  const F n = shifted - magic;
  F r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F y = splat(1.f / 5040.f);
  y = fma(y, r, splat(1.f / 720.f));
  y = fma(y, r, splat(1.f / 120.f));
  y = fma(y, r, splat(1.f / 24.f));
  y = fma(y, r, splat(1.f / 6.f));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.f));
  y = fma(y, r, splat(1.f));
  const F scaled = (F)((U)y + ((U)shifted << 23));
  return x < splat(-87.f) ? F{} : (x == x ? scaled : x);
}

SAW_INT4_INLINE F tanh(F x) {
  const U sign = (U)x & 0x80000000u;
  const F magnitude = (F)((U)x ^ sign);
  const F e = exp_nonpositive(magnitude * splat(-2.f));
  return (F)((U)((splat(1.f) - e) / (splat(1.f) + e)) | sign);
}

}  // namespace saw_int4::SAW_INT4_ISA
