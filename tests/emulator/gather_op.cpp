#include "emulator/library.h"
#include "gather/gather_dispatch.h"

namespace saw_int4::emulator {

void gather(const GatherParams& p) {
  saw_int4::gather(p, nullptr);
}

}  // namespace saw_int4::emulator
