// launch(kernel, grid, block, shared_bytes, stream, args...): one checked kernel launch, on the GPU or in the
// emulator. Throws std::runtime_error naming the kernel, the shape of the launch and CUDA's reason.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device_limits.h"

#if defined(SAW_INT4_EMULATE)
#include "emulator/launch.h"
#else
#include <cuda_runtime.h>

namespace saw_int4 {

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("saw_int4: ") + what + " failed: " + cudaGetErrorString(status));
}

template <typename... KernelArgs, typename... Args>
void launch_with(bool dependent, const char* name, void (*kernel)(KernelArgs...), int grid, int block, int shared_bytes,
                 Stream stream, const Args&... args) {
  // More than 48 KiB of dynamic shared memory must be asked for, per kernel and device.
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = dependent ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kernel, args...);
  }
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("saw_int4: launch of ") + name + " (grid " + std::to_string(grid) +
                             ", block " + std::to_string(block) + ", shared memory " + std::to_string(shared_bytes) +
                             " bytes) failed: " + cudaGetErrorString(status));
}

template <typename... KernelArgs, typename... Args>
void launch(const char* name, void (*kernel)(KernelArgs...), int grid, int block, int shared_bytes, Stream stream,
            const Args&... args) {
  launch_with(false, name, kernel, grid, block, shared_bytes, stream, args...);
}

// The same, but its blocks may start before the launch before it in the stream has ended (cuda_thread.h), on devices
// with dependent_launches. In a captured graph that is a programmatic dependency.
template <typename... KernelArgs, typename... Args>
void launch_dependent(const char* name, void (*kernel)(KernelArgs...), int grid, int block, int shared_bytes,
                      Stream stream, const Args&... args) {
  launch_with(true, name, kernel, grid, block, shared_bytes, stream, args...);
}

inline DeviceLimits device_limits(int device) {
  DeviceLimits limits;
  check_cuda(cudaDeviceGetAttribute(&limits.sm_count, cudaDevAttrMultiProcessorCount, device), "asking the device");
  check_cuda(cudaDeviceGetAttribute(&limits.shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
             "asking the device");
  check_cuda(cudaDeviceGetAttribute(&limits.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking the device");
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking the device");
  limits.dependent_launches = major >= 9;
  return limits;
}

}  // namespace saw_int4
#endif
