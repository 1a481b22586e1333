// Which CPU kernels run.
#include <atomic>
#include <stdexcept>

#include "cpu/kernels.h"

namespace saw_int4 {

#if defined(__x86_64__)
namespace avx512 {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
#endif
namespace portable {
extern const CpuKernels kKernels;
}

namespace {

std::vector<const CpuKernels*> supported() {
  std::vector<const CpuKernels*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&avx512::kKernels);
  }
  // No machine has AVX2 and FMA without F16C.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
  found.push_back(&portable::kKernels);
  return found;
}

std::atomic<const CpuKernels*>& current() {
  static std::atomic<const CpuKernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  return *current().load(std::memory_order_relaxed);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : supported()) names.emplace_back(kernels->isa);
  return names;
}

void set_cpu_isa(const std::string& isa) {
  std::string names;
  for (const CpuKernels* kernels : supported()) {
    if (isa == kernels->isa) {
      current().store(kernels, std::memory_order_relaxed);
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + kernels->isa;
  }
  throw std::invalid_argument("set_cpu_isa: got '" + isa + "', expected one that this machine has: " + names);
}

}  // namespace saw_int4
