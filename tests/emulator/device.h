// The intrinsics of csrc/common/device.h, executed. Same names, same semantics; the site of each call is an extra
// defaulted argument, so that errors can name the line of the kernel.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/fragments.h"
#include "emulator/half.h"
#include "emulator/machine.h"

#define SAW_INT4_KERNEL void
#define SAW_INT4_DEVICE inline
#define SAW_INT4_LAUNCH_BOUNDS(threads, blocks_per_sm)
#define SAW_INT4_UNROLL
#define SAW_INT4_UNROLL_BY(n)

// CUDA's vector types, with CUDA's alignment.
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace saw_int4::dev {

using emulator::machine;
using emulator::Site;

#ifdef SAW_INT4_EMULATE_OTHER_ARCH
inline constexpr bool kMeasuredArch = false;
#else
inline constexpr bool kMeasuredArch = true;
#endif
inline constexpr bool kLargeShared = true;

inline int thread_index() {
  return machine().current().index;
}
inline int thread_count() {
  return machine().block_threads();
}
inline int block_index() {
  return machine().current().block->index;
}
inline int block_count() {
  return machine().grid();
}
inline int lane_id() {
  return machine().current().lane;
}

inline void block_sync(Site site = Site::current()) {
  machine().block_sync(site);
}
inline bool four_warps_any(bool predicate, Site site = Site::current()) {
  return machine().four_warps_any(predicate, site);
}
inline void four_warps_sync(Site site = Site::current()) {
  machine().four_warps_any(false, site);
}
inline void warp_sync(Site site = Site::current()) {
  machine().warp_sync(site);
}
[[noreturn]] inline void trap(Site site = Site::current()) {
  machine().stop(site, "trap");
}

// ---- collectives of a warp ----

template <class T>
T shfl_xor(T value, int mask, Site site = Site::current()) {
  struct In {
    T value;
    int mask;
  };
  return machine().collective<T>("shfl_xor", site, In{value, mask}, [&](const In* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[(lane ^ in[lane].mask) & 31].value;
  });
}

template <class T>
T shfl_idx(T value, int source, Site site = Site::current()) {
  struct In {
    T value;
    int source;
  };
  return machine().collective<T>("shfl_idx", site, In{value, source}, [&](const In* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[in[lane].source & 31].value;
  });
}

template <class T>
T shfl_up(T value, int delta, Site site = Site::current()) {
  struct In {
    T value;
    int delta;
  };
  return machine().collective<T>("shfl_up", site, In{value, delta}, [&](const In* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) {
      const int source = lane - (in[lane].delta & 31);
      out[lane] = in[source < 0 ? lane : source].value;
    }
  });
}

inline bool any(bool predicate, Site site = Site::current()) {
  return machine().collective<bool>("any", site, predicate, [](const bool* in, bool* out) {
    std::fill(out, out + 32, std::any_of(in, in + 32, [](bool vote) { return vote; }));
  });
}

inline int count_lanes(bool predicate, Site site = Site::current()) {
  return machine().collective<int>("count_lanes", site, predicate, [](const bool* in, int* out) {
    std::fill(out, out + 32, static_cast<int>(std::count(in, in + 32, true)));
  });
}

inline int warp_id() {
  return machine().current().warp->index;
}

namespace detail {

template <emulator::Element kElement>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* name, const Site& site) {
  emulator::MmaOperands in;
  std::memcpy(in.a, a, sizeof a);
  std::memcpy(in.b, b, sizeof b);
  std::memcpy(in.c, d, sizeof d);
  const auto out = machine().collective<emulator::MmaResult>(name, site, in, emulator::mma_m16n8k16<kElement>);
  std::memcpy(d, out.d, sizeof d);
}

}  // namespace detail

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  detail::mma<emulator::Element::kHalf>(d, a, b, "mma_m16n8k16_f16", site);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Site site = Site::current()) {
  detail::mma<emulator::Element::kBFloat16>(d, a, b, "mma_m16n8k16_bf16", site);
}
inline uint32_t movmatrix_trans_b16(uint32_t row_pair, Site site = Site::current()) {
  return machine().collective<uint32_t>("movmatrix_trans_b16", site, row_pair, emulator::movmatrix_trans);
}

struct SharedOperand {
  uint32_t address;
};
inline SharedOperand shared_operand(uint32_t base, int bytes) {
  return {base + bytes};
}
// Each lane reads some runs of the matrices, as ldmatrix would, and the warp multiplies; the other warps of a wgmma do
// the same for themselves. The sums are out of sight until shared_mma_end.
template <bool kRowsOfB>
void shared_mma(float (&d)[4][4], const uint32_t (&a)[4], SharedOperand b, Site site = Site::current()) {
  auto& self = machine().current();
  std::vector<float>& sums = machine().product(&d[0][0], site);
  machine().use_operands(a, b.address, site);
  for (int nt = 0; nt < 4; ++nt) {
    emulator::Run run;
    const uint32_t at = b.address + (self.lane / 8 % 2 * 4 + nt) * 128 + self.lane % 8 * 16;
    self.block->shared.read_operand(&run, at, sizeof run, self.index, self.block->clocks, site);
    const auto fragment =
        machine().collective<emulator::BFragment>("shared_mma", site, run, emulator::fragment_of_runs<kRowsOfB>);
    float tile[4];
    std::copy_n(sums.begin() + 4 * nt, 4, tile);
    detail::mma<emulator::Element::kHalf>(tile, a, fragment.b, "shared_mma", site);
    std::copy_n(tile, 4, sums.begin() + 4 * nt);
  }
}
inline void shared_mma_start(float (&d)[4][4], Site site = Site::current()) {
  machine().start_product(&d[0][0], 16, site);
}
template <bool kRowsOfB>
void shared_mma_first(float (&d)[4][4], const uint32_t (&a)[4], SharedOperand b, Site site = Site::current()) {
  std::fill_n(&d[0][0], 16, 0.f);
  shared_mma_start(d, site);
  shared_mma<kRowsOfB>(d, a, b, site);
}
inline void shared_mma_end(float (&d)[4][4], Site site = Site::current()) {
  machine().end_product(&d[0][0], site);
}
template <int R>
void shared_mma_begin(uint32_t (&)[R][4]) {}
inline void shared_mma_commit() {
  machine().commit_products();
}
template <int N, int R>
void shared_mma_wait(uint32_t (&)[R][4]) {
  machine().wait_for_products(N);
}
inline void publish_shared() {
  machine().current().block->shared.publish(machine().current().index);
}

// ---- memory ----

inline uint32_t shared_base() {
  return emulator::SharedMemory::kBase;
}

template <class T>
T ld_shared(uint32_t address, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<T>);
  auto& self = machine().current();
  T value;
  self.block->shared.read(&value, address, sizeof(T), self.index, self.block->clocks, site);
  return value;
}
template <class T>
void st_shared(uint32_t address, T value, Site site = Site::current()) {
  auto& self = machine().current();
  self.block->shared.write(address, &value, sizeof(T), self.index, self.block->clocks, site);
}
// A collective of the warp; each lane writes the runs that it names to stmatrix.
inline void st_matrices(uint32_t to, const uint32_t (&x)[4], Site site = Site::current()) {
  struct In {
    uint32_t x[4];
  };
  In in;
  std::copy_n(x, 4, in.x);
  const int lane = lane_id(), matrix = lane / 8, row = lane % 8;
  struct Row {
    uint32_t x[4];
  };
  const Row mine = machine().collective<Row>("st_matrices", site, in, [](const In* in, Row* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int c = 0; c < 4; ++c) out[lane].x[c] = in[4 * (lane % 8) + c].x[lane / 8];
  });
  st_shared(to + (matrix * 8 + row) * 16, uint4{mine.x[0], mine.x[1], mine.x[2], mine.x[3]}, site);
}
template <class T>
T ld_global(const T* pointer, Site site = Site::current()) {
  T value;
  machine().global().read(&value, pointer, sizeof(T), true, machine().accessor(), site);
  return value;
}
template <class T>
T ld_global_coherent(const T* pointer, Site site = Site::current()) {
  T value;
  machine().global().read(&value, pointer, sizeof(T), false, machine().accessor(), site);
  return value;
}
template <class T>
void st_global(T* pointer, T value, Site site = Site::current()) {
  machine().global().write(pointer, &value, sizeof(T), machine().accessor(), site);
}
inline void st_global_if(bool valid, uint32_t* pointer, uint32_t value, Site site = Site::current()) {
  if (valid) st_global(pointer, value, site);
}
inline void prefetch_l2(const void*) {}
inline uint32_t atomic_add_acq_rel_u32(uint32_t* target, uint32_t value, Site site = Site::current()) {
  machine().global().fence(machine().accessor());
  const uint32_t before = machine().global().atomic_add(target, value, machine().accessor(), site);
  machine().global().fence(machine().accessor());
  machine().yield();
  return before;
}
inline void let_dependents_start() {}
inline void wait_for_launch_before() {
  machine().wait_for_launch_before();
}

template <int BYTES>
void cp_async_zfill(uint32_t address, const void* source, bool valid, Site site = Site::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulator::AsyncCopy copy{address, BYTES, valid ? source : nullptr, {}, site};
  if (valid) machine().global().read(copy.data.data(), source, BYTES, false, machine().accessor(), site);
  machine().issue_copy(copy);
}
inline void cp_async_commit() {
  machine().commit_copies();
}
template <int N>
void cp_async_wait(Site site = Site::current()) {
  machine().wait_for_copies(N, site);
}

// ---- bits and arithmetic ----

inline uint32_t lop3_and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  return (x & mask) | bits;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i);
    auto byte = static_cast<uint8_t>(bytes >> (8 * (nibble & 7)));
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;  // the byte's sign, eight times
    result |= static_cast<uint32_t>(byte) << (8 * i);
  }
  return result;
}
inline uint32_t dot_u8x4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
  return c;
}
inline uint32_t dot_s8x4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
inline int32_t max3(int32_t a, int32_t b, int32_t c) {
  return std::max({a, b, c});
}
inline uint32_t max3(uint32_t a, uint32_t b, uint32_t c) {
  return std::max({a, b, c});
}
inline uint64_t mul_wide(uint32_t a, uint32_t b) {
  return uint64_t{a} * b;
}
inline uint32_t mul_hi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

inline uint32_t float_bits(float x) {
  return std::bit_cast<uint32_t>(x);
}
inline float bits_float(uint32_t x) {
  return std::bit_cast<float>(x);
}

inline float f16_to_float(uint16_t h) {
  return emulator::half_to_float(h);
}
inline uint16_t float_to_f16(float f) {
  return emulator::float_to_half(f);
}
inline float bf16_to_float(uint16_t h) {
  return emulator::bf16_to_float(h);
}
inline uint16_t float_to_bf16(float f) {
  return emulator::float_to_bf16(f);
}
inline uint32_t pack_f16x2(float lo, float hi) {
  return float_to_f16(lo) | uint32_t{float_to_f16(hi)} << 16;
}
inline uint32_t pack_bf16x2(float lo, float hi) {
  return float_to_bf16(lo) | uint32_t{float_to_bf16(hi)} << 16;
}
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t pair, int i) { return static_cast<uint16_t>(pair >> (16 * i)); };
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) d |= uint32_t{emulator::half_fma(half(a, i), half(b, i), half(c, i))} << (16 * i);
  return d;
}

// Compiled with -ffp-contract=off.
inline float add_rn(float a, float b) {
  return a + b;
}
inline float sub_rn(float a, float b) {
  return a - b;
}
inline float mul_rn(float a, float b) {
  return a * b;
}
inline float div_rn(float a, float b) {
  return a / b;
}
inline float fma_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
// +0 is larger than -0, and the other operand wins against a NaN, or loses in the _nan variants.
inline float fmin(float a, float b) {
  return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
}
inline float fmax(float a, float b) {
  return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
}
inline float fmin_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : dev::fmin(a, b);
}
inline float fmax_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : dev::fmax(a, b);
}
inline bool is_finite(float x) {
  return (float_bits(x) & 0x7f800000u) != 0x7f800000u;
}

namespace detail {
inline float flush_subnormal(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}
}  // namespace detail

// Within 1 ulp here, about 2 on the GPU; subnormals flushed as there.
inline float exp2_approx(float x) {
  return detail::flush_subnormal(std::exp2(detail::flush_subnormal(x)));
}
inline float rcp_approx(float x) {
  return detail::flush_subnormal(1.f / detail::flush_subnormal(x));
}
inline float log2_approx(float x) {
  return std::log2(detail::flush_subnormal(x));
}

}  // namespace saw_int4::dev
