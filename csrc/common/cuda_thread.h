// Threads, barriers, shuffles, votes and the few global atomics. CUDA room of common/device.h.
#pragma once

#include <cstdint>

#define SAW_INT4_KERNEL __global__ void
#define SAW_INT4_DEVICE __device__ __forceinline__
#define SAW_INT4_LAUNCH_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)
#define SAW_INT4_UNROLL _Pragma("unroll")
#define SAW_INT4_PRAGMA(text) _Pragma(#text)
#define SAW_INT4_UNROLL_BY(n) SAW_INT4_PRAGMA(unroll n)

namespace saw_int4::dev {

inline constexpr uint32_t kFullMask = 0xffffffffu;

// Whether this code is for sm_90, where kernels were measured. Register budgets that fit there to the last register
// make the compiler spill elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
inline constexpr bool kMeasuredArch = true;
#else
inline constexpr bool kMeasuredArch = false;
#endif
// Whether a block may have kLargeSharedBytes of shared memory: sm_90, and sm_100 with its family.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 900 || (__CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200))
inline constexpr bool kLargeShared = true;
#else
inline constexpr bool kLargeShared = false;
#endif

// Grids and blocks have one dimension.
SAW_INT4_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
SAW_INT4_DEVICE int thread_count() {
  return static_cast<int>(blockDim.x);
}
SAW_INT4_DEVICE int block_index() {
  return static_cast<int>(blockIdx.x);
}
SAW_INT4_DEVICE int block_count() {
  return static_cast<int>(gridDim.x);
}
SAW_INT4_DEVICE int lane_id() {
  return static_cast<int>(threadIdx.x & 31u);
}
SAW_INT4_DEVICE int warp_id() {
  return static_cast<int>(threadIdx.x / 32u);
}

SAW_INT4_DEVICE void block_sync() {
  __syncthreads();
}
// A barrier of the four warps that start at a multiple of four; and whether pred holds in any of their threads.
SAW_INT4_DEVICE void four_warps_sync() {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
}
SAW_INT4_DEVICE bool four_warps_any(bool pred) {
  uint32_t result;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbar.red.or.pred q, %2, 128, p;\nselp.u32 %0, 1, 0, q;\n}"
               : "=r"(result)
               : "r"(static_cast<uint32_t>(pred)), "r"(1 + threadIdx.x / 128)
               : "memory");
  return result != 0;
}
SAW_INT4_DEVICE void warp_sync() {
  __syncwarp();
}

// All 32 lanes take part. T: float, int, uint32_t.
template <typename T>
SAW_INT4_DEVICE T shfl_xor(T v, int lane_mask) {
  return __shfl_xor_sync(kFullMask, v, lane_mask);
}
template <typename T>
SAW_INT4_DEVICE T shfl_up(T v, int delta) {  // lanes below delta keep their own v
  return __shfl_up_sync(kFullMask, v, delta);
}
template <typename T>
SAW_INT4_DEVICE T shfl_idx(T v, int lane) {
  return __shfl_sync(kFullMask, v, lane);
}
SAW_INT4_DEVICE bool any(bool pred) {
  return __any_sync(kFullMask, pred);
}
SAW_INT4_DEVICE int count_lanes(bool pred) {
  return __popc(__ballot_sync(kFullMask, pred));
}

// Adds to a word; returns what it held. What the block's threads wrote before (a barrier in between) is seen by
// whoever adds to the same word later and then reads, past a barrier too.
SAW_INT4_DEVICE uint32_t atomic_add_acq_rel_u32(uint32_t* p, uint32_t v) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
  return before;
}
// Dependent launches (common/launch.h). Blocks of one may start once every block of the launch before has said so or
// left; they see what that launch writes, and write themselves, after wait_for_launch_before, which returns when it has
// ended. Every thread must wait, so that whatever comes next comes after both.
SAW_INT4_DEVICE void let_dependents_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
SAW_INT4_DEVICE void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
SAW_INT4_DEVICE void trap() {
  __trap();
}

}  // namespace saw_int4::dev
