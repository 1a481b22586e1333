// csrc/common/launch.h for the emulator: the same launch(), run by the emulated machine.
#pragma once

#include <type_traits>

#include "common/device_limits.h"
#include "emulator/machine.h"

namespace saw_int4 {

using Stream = const void*;  // launches run at once

template <typename... KernelArgs, typename... Args>
void launch(const char* name, void (*kernel)(KernelArgs...), int grid, int block, int shared_bytes, Stream,
            const Args&... args) {
  emulator::machine().launch(name, grid, block, static_cast<uint32_t>(shared_bytes),
                             [&] { kernel(static_cast<std::remove_cvref_t<KernelArgs>>(args)...); });
}

template <typename... KernelArgs, typename... Args>
void launch_dependent(const char* name, void (*kernel)(KernelArgs...), int grid, int block, int shared_bytes, Stream,
                      const Args&... args) {
  emulator::machine().launch(
      name, grid, block, static_cast<uint32_t>(shared_bytes),
      [&] { kernel(static_cast<std::remove_cvref_t<KernelArgs>>(args)...); }, true);
}

inline DeviceLimits device_limits(int) {
  const emulator::Options& options = emulator::machine().options();
  const auto shared = static_cast<int>(options.shared_bytes);
  return {options.sm_count, shared + kSharedReservedPerBlock, shared, options.dependent_launches};
}

}  // namespace saw_int4
