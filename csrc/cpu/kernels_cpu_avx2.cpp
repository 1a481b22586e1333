// The CPU kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"
#include "format.h"
#include "params.h"

#pragma GCC target("avx2,fma,f16c")
#define SAW_INT4_AVX2
#define SAW_INT4_ISA avx2
#define SAW_INT4_ISA_NAME "avx2"
#include "cpu/kernels_impl.h"
#endif
