// MMAs whose B lies in shared memory. CUDA room of common/device.h. On sm_90a they are wgmma, of the four warps that
// start at a multiple of four: every one of them must issue the same, and B is fetched once for all. Elsewhere each
// warp loads B's fragments for itself.
//
// B [16, 32] is 2 x 4 matrices of 8x8 values, 128 bytes each, the second eight rows of B after all of the first; a
// matrix is 8 runs of 8 values, run i holding column i of B, or row i where kRowsOfB.
#pragma once

#include "common/cuda_memory.h"
#include "common/cuda_mma.h"

namespace saw_int4::dev {

// One product or several with the same d, asynchronous: nobody touches d from shared_mma_start to shared_mma_end, nor a
// from shared_mma_begin to the shared_mma_wait that covers its group, nor B until then.
//
//     shared_mma_start(d);  { shared_mma_begin(a); shared_mma(d, a, b) ..; shared_mma_commit(); } ..
//     shared_mma_wait<0>(a); shared_mma_end(d);
//
// shared_mma_first(d, a, b) is a start from zeros and a shared_mma.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The compiler takes registers for free as soon as it sees no use: these are uses.
SAW_INT4_DEVICE void pin(float (&d)[4][4]) {
  SAW_INT4_UNROLL
  for (int nt = 0; nt < 4; ++nt)
    asm volatile("" : "+f"(d[nt][0]), "+f"(d[nt][1]), "+f"(d[nt][2]), "+f"(d[nt][3])::"memory");
}
template <int R>
SAW_INT4_DEVICE void pin(uint32_t (&a)[R][4]) {
  SAW_INT4_UNROLL
  for (int r = 0; r < R; ++r) asm volatile("" : "+r"(a[r][0]), "+r"(a[r][1]), "+r"(a[r][2]), "+r"(a[r][3])::"memory");
}
SAW_INT4_DEVICE void shared_mma_start(float (&d)[4][4]) {
  pin(d);
}
SAW_INT4_DEVICE void shared_mma_end(float (&d)[4][4]) {
  pin(d);
}
template <int R>
SAW_INT4_DEVICE void shared_mma_begin(uint32_t (&a)[R][4]) {
  pin(a);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SAW_INT4_DEVICE void shared_mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most N committed groups are in flight. a: operands of those that are done.
template <int N, int R>
SAW_INT4_DEVICE void shared_mma_wait(uint32_t (&a)[R][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  pin(a);
}

// B that begins so many bytes after address `base`, a multiple of 16: its descriptor, with no swizzling: address,
// distance of matrices along K, and along N, in units of 16 bytes. That of base is the same for many B.
struct SharedOperand {
  uint64_t descriptor;
};
SAW_INT4_DEVICE SharedOperand shared_operand(uint32_t base, int bytes) {
  constexpr uint64_t kAlongK = 4 * 128 / 16, kAlongN = 128 / 16;
  return {((base & 0x3ffffu) >> 4 | kAlongK << 16 | kAlongN << 32) + (bytes >> 4)};
}
// kind: "=f" for d = A B, "+f" for d += A B, which also says adds = "1".
#define SAW_INT4_WGMMA(kind, adds)                                                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds                                                            \
               ", 0;\n"                                                                                            \
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "                                               \
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, %21;\n}" \
               : kind(d[0][0]), kind(d[0][1]), kind(d[0][2]), kind(d[0][3]), kind(d[1][0]), kind(d[1][1]),         \
                 kind(d[1][2]), kind(d[1][3]), kind(d[2][0]), kind(d[2][1]), kind(d[2][2]), kind(d[2][3]),         \
                 kind(d[3][0]), kind(d[3][1]), kind(d[3][2]), kind(d[3][3])                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "n"(kRowsOfB ? 1 : 0))
// d[nt] = A B[nt]. A as in mma_m16n8k16, d[nt] as D there.
template <bool kRowsOfB>
SAW_INT4_DEVICE void shared_mma_first(float (&d)[4][4], const uint32_t (&a)[4], SharedOperand b) {
  SAW_INT4_WGMMA("=f", "0");
}
// d[nt] += A B[nt].
template <bool kRowsOfB>
SAW_INT4_DEVICE void shared_mma(float (&d)[4][4], const uint32_t (&a)[4], SharedOperand b) {
  SAW_INT4_WGMMA("+f", "1");
}
#undef SAW_INT4_WGMMA
// What this thread stored to shared memory is seen by shared_mma after a barrier.
SAW_INT4_DEVICE void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#else

struct SharedOperand {
  uint32_t address;
};
SAW_INT4_DEVICE SharedOperand shared_operand(uint32_t base, int bytes) {
  return {base + bytes};
}
template <bool kRowsOfB>
SAW_INT4_DEVICE void shared_mma(float (&d)[4][4], const uint32_t (&a)[4], SharedOperand operand) {
  // Lanes name the runs: 8 to a matrix, the two matrices of nt, then those of nt + 1.
  const int lane = lane_id();
  const uint32_t b = operand.address + lane / 8 % 2 * (4 * 128) + lane / 16 * 128 + lane % 8 * 16;
  SAW_INT4_UNROLL
  for (int nt = 0; nt < 4; nt += 2) {
    uint32_t r[4];
    if constexpr (kRowsOfB)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(b + nt * 128)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(b + nt * 128)
                   : "memory");
    mma_m16n8k16_f16(d[nt], a, {r[0], r[1]});
    mma_m16n8k16_f16(d[nt + 1], a, {r[2], r[3]});
  }
}
template <bool kRowsOfB>
SAW_INT4_DEVICE void shared_mma_first(float (&d)[4][4], const uint32_t (&a)[4], SharedOperand b) {
  SAW_INT4_UNROLL
  for (int nt = 0; nt < 4; ++nt) d[nt][0] = d[nt][1] = d[nt][2] = d[nt][3] = 0.f;
  shared_mma<kRowsOfB>(d, a, b);
}
SAW_INT4_DEVICE void shared_mma_start(float (&)[4][4]) {}
SAW_INT4_DEVICE void shared_mma_end(float (&)[4][4]) {}
template <int R>
SAW_INT4_DEVICE void shared_mma_begin(uint32_t (&)[R][4]) {}
SAW_INT4_DEVICE void shared_mma_commit() {}
template <int N, int R>
SAW_INT4_DEVICE void shared_mma_wait(uint32_t (&)[R][4]) {}
SAW_INT4_DEVICE void publish_shared() {}

#endif

// Four 8x8 matrices of 16-bit values to shared memory, 128 contiguous bytes each, rows of 16: lane 4*g + c holds
// M[g][2c, 2c+1] of matrix nt in x[nt].
SAW_INT4_DEVICE void st_matrices(uint32_t to, const uint32_t (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to + lane_id() * 16), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#else
  SAW_INT4_UNROLL
  for (int nt = 0; nt < 4; ++nt) st_shared(to + nt * 128 + lane_id() * 4, x[nt]);
#endif
}

}  // namespace saw_int4::dev
