// gather_kv on the CPU: the bit-exact specification of dequantization.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels.h"

namespace saw_int4 {
namespace {

void gather_kv(const GatherParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    TORCH_CHECK(p.slots[t] >= 0 && p.slots[t] < p.num_slots, "gather_kv: slots[", t, "] is ", p.slots[t],
                ", expected 0 .. ", p.num_slots - 1, ", the slots of the cache");
  }
  const CpuKernels& kernels = cpu_kernels();
  at::parallel_for(0, p.num_tokens * p.num_kv_heads, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(p.head_dim);
    kernels.gather_rows(p, begin, end, scratch.data());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("gather_kv", operator_of(gather_params, [](const GatherParams& p, const auto&...) { gather_kv(p); }));
}

}  // namespace saw_int4
