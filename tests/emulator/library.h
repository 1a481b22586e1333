// The emulated operators: one function per operator, compiled in a file of its own, launching what csrc launches.
#pragma once

#include "params.h"

namespace saw_int4::emulator {

void append(const AppendParams& p);
void decode(const DecodeParams& p);
void gather(const GatherParams& p);
void transform_rows(const TransformRowsParams& p);

}  // namespace saw_int4::emulator
