#include "decode/decode_launch.cuh"

namespace saw_int4 {
template void launch_decode<80, 1>(const DecodeParams&, const DecodePlan&, Stream);
template void launch_decode<96, 1>(const DecodeParams&, const DecodePlan&, Stream);
template void launch_decode<112, 1>(const DecodeParams&, const DecodePlan&, Stream);
template void launch_decode<192, 1>(const DecodeParams&, const DecodePlan&, Stream);
}  // namespace saw_int4
