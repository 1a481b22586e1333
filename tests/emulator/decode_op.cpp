#include "decode/decode_dispatch.h"
#include "emulator/library.h"

namespace saw_int4::emulator {

void decode(const DecodeParams& p) {
  saw_int4::decode(p, device_limits(0), nullptr);
}

}  // namespace saw_int4::emulator
