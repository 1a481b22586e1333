#include "emulator/library.h"
#include "transform/transform_dispatch.h"

namespace saw_int4::emulator {

void transform_rows(const TransformRowsParams& p) {
  saw_int4::transform_rows(p, nullptr);
}

}  // namespace saw_int4::emulator
