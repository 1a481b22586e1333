#include "decode/decode_launch.cuh"

namespace saw_int4 {
template void launch_decode<80, 2>(const DecodeParams&, const DecodePlan&, Stream);
template void launch_decode<96, 2>(const DecodeParams&, const DecodePlan&, Stream);
template void launch_decode<112, 2>(const DecodeParams&, const DecodePlan&, Stream);
template void launch_decode<192, 2>(const DecodeParams&, const DecodePlan&, Stream);
}  // namespace saw_int4
