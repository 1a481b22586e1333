// The only names through which kernels touch the machine: threads, memory, tensor cores, roundings.
// Under nvcc they are PTX and builtins (the rooms below); with SAW_INT4_EMULATE they are the functions of the same
// names of tests/emulator/device.h, which runs the kernels' source on a CPU and checks every access.
//
// Marks a kernel needs: SAW_INT4_KERNEL, SAW_INT4_DEVICE, SAW_INT4_LAUNCH_BOUNDS(threads, blocks_per_sm),
// SAW_INT4_UNROLL or SAW_INT4_UNROLL_BY(n) before a loop. Everything else lives in namespace saw_int4::dev.
#pragma once

#if defined(SAW_INT4_EMULATE)
#include "emulator/device.h"
#else
#include "common/cuda_math.h"
#include "common/cuda_memory.h"
#include "common/cuda_mma.h"
#include "common/cuda_shared_mma.h"
#include "common/cuda_thread.h"
#endif
