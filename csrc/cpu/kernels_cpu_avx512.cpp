// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <immintrin.h>

#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"
#include "format.h"
#include "params.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both: inside GCC's own _mm512_undefined_*()
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define SAW_INT4_AVX512
#define SAW_INT4_ISA avx512
#define SAW_INT4_ISA_NAME "avx512"
#include "cpu/kernels_impl.h"
#endif
