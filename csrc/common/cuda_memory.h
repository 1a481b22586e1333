// Shared memory by byte address, global memory by pointer, and cp.async between them. CUDA room of common/device.h.
// Every address must be aligned to the size of what is accessed.
#pragma once

#include <cstdint>

#include "common/cuda_thread.h"

namespace saw_int4::dev {

extern __shared__ __align__(128) unsigned char dynamic_shared[];

// Byte address of the block's dynamic shared memory, the only shared memory there is; 128-byte aligned.
SAW_INT4_DEVICE uint32_t shared_base() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

// T: uint16_t, uint32_t, int32_t, float, int2, uint2, uint4, float2, float4.
template <typename T>
SAW_INT4_DEVICE T ld_shared(uint32_t addr) {
  return *reinterpret_cast<const T*>(__cvta_shared_to_generic(addr));
}
template <typename T>
SAW_INT4_DEVICE void st_shared(uint32_t addr, T v) {
  *reinterpret_cast<T*>(__cvta_shared_to_generic(addr)) = v;
}

// ld_global: data that nobody writes during the launch. ld_global_coherent: data that another block may have
// written (atomic_add_acq_rel_u32), or the launch before. T: as above, and int64_t.
template <typename T>
SAW_INT4_DEVICE T ld_global(const T* p) {
  return __ldg(p);
}
SAW_INT4_DEVICE int64_t ld_global(const int64_t* p) {
  return static_cast<int64_t>(__ldg(reinterpret_cast<const long long*>(p)));
}
template <typename T>
SAW_INT4_DEVICE T ld_global_coherent(const T* p) {
  return __ldcg(p);
}
template <typename T>
SAW_INT4_DEVICE void st_global(T* p, T v) {
  *p = v;
}
// By a predicate: the compiler takes a branch for what belongs to such a store alone.
SAW_INT4_DEVICE void st_global_if(bool valid, uint32_t* p, uint32_t v) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.u32 [%1], %2;\n}" ::"r"(static_cast<uint32_t>(valid)),
      "l"(__cvta_generic_to_global(p)), "r"(v)
      : "memory");
}
// Has the line brought to L2; orders nothing.
SAW_INT4_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// Copies BYTES from global to shared memory, past L1; visible to the thread after cp_async_wait, to the block after a
// barrier following it. With valid == false nothing is read and zeros are written.
template <int BYTES>
SAW_INT4_DEVICE void cp_async_zfill(uint32_t dst, const void* src, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if constexpr (BYTES == 16) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.u32 p, %2, 0;\ncp.async.cg.shared.global.L2::128B [%0], [%1], 16, p;\n}" ::"r"(dst),
        "l"(__cvta_generic_to_global(src)), "r"(static_cast<uint32_t>(valid))
        : "memory");
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %3, 0;\ncp.async.ca.shared.global [%0], [%1], %2, p;\n}" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "n"(BYTES), "r"(static_cast<uint32_t>(valid))
                 : "memory");
  }
}
SAW_INT4_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's committed groups are in flight.
template <int N>
SAW_INT4_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace saw_int4::dev
