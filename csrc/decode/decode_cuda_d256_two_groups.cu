#include "decode/decode_launch.cuh"

namespace saw_int4 {
template void launch_decode<256, 2>(const DecodeParams&, const DecodePlan&, Stream);
}
