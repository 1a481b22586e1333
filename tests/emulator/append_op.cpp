#include "append/append_dispatch.h"
#include "emulator/library.h"

namespace saw_int4::emulator {

void append(const AppendParams& p) {
  saw_int4::append(p, device_limits(0), nullptr);
}

}  // namespace saw_int4::emulator
