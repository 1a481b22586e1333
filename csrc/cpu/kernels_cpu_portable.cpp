// The CPU kernels for any processor.
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"
#include "format.h"
#include "params.h"

#define SAW_INT4_ISA portable
#define SAW_INT4_ISA_NAME "portable"
#include "cpu/kernels_impl.h"
