// What the launch planners ask about a device.
#pragma once

namespace saw_int4 {

struct DeviceLimits {
  int sm_count = 0;
  int shared_bytes_per_sm = 0;      // what the blocks resident on one SM share, kSharedReservedPerBlock each included
  int shared_bytes_per_block = 0;   // the most one block may ask for
  bool dependent_launches = false;  // a launch can start before the one it depends on has ended: sm_90 and later
};

inline constexpr int kLargeSharedBytes = 200 * 1024;  // of a block: dev::kLargeShared
inline constexpr int kSharedReservedPerBlock = 1024;  // by CUDA, on every architecture

}  // namespace saw_int4
