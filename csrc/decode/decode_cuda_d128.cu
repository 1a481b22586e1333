#include "decode/decode_launch.cuh"

namespace saw_int4 {
template void launch_decode<128>(const DecodeParams&, const DecodePlan&, Stream);
}
