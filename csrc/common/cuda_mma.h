// Tensor-core fragments. CUDA room of common/device.h. lane = 4*g + c, g = 0..7, c = 0..3; a register holds two
// 16-bit values, the lower one first:
//   A [16, 16]: a[0] = A[g][2c, 2c+1]      a[1] = A[g+8][2c, 2c+1]   a[2] = A[g][2c+8, 2c+9]   a[3] = A[g+8][2c+8,
//   2c+9] B [16, 8]:  b[0] = B[2c, 2c+1][g]      b[1] = B[2c+8, 2c+9][g] D [16, 8]:  d[0] = D[g][2c]            d[1] =
//   D[g][2c+1]         d[2] = D[g+8][2c]         d[3] = D[g+8][2c+1]
#pragma once

#include <cstdint>

#include "common/cuda_thread.h"

namespace saw_int4::dev {

// d += A B, fp16 operands, fp32 sums.
SAW_INT4_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d += A B, bf16 operands, fp32 sums.
SAW_INT4_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Transposes an 8x8 matrix of 16-bit values; lane 4*g + c holds M[g][2c, 2c+1] before, M[2c, 2c+1][g] after.
SAW_INT4_DEVICE uint32_t movmatrix_trans_b16(uint32_t x) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
  return d;
}

}  // namespace saw_int4::dev
