// Everything that is compiled once per instruction set. The including file has included the headers below before it
// switched the compiler's target, so that no function shared with other files carries that target's instructions.
#pragma once

#include "cpu/simd.h"
//
#include "cpu/row.h"
//
#include "append/append_cpu_rows.h"
#include "decode/decode_cpu_kernel.h"
#include "gather/gather_cpu_rows.h"
#include "transform/transform_cpu_rows.h"

namespace saw_int4::SAW_INT4_ISA {
extern const CpuKernels kKernels;
const CpuKernels kKernels = {SAW_INT4_ISA_NAME, append_rows,  gather_rows,  transform_rows,
                             decode_prepare,    decode_chunk, decode_merge, decode_scratch_floats};
}  // namespace saw_int4::SAW_INT4_ISA
