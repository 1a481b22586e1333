// Decode of two groups, as it is compiled for any architecture but sm_90.
#define SAW_INT4_EMULATE_OTHER_ARCH
#include "decode/decode_cuda_d64_two_groups.cu"
