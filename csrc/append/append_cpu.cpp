// append_kv on the CPU: the bit-exact specification of the bytes.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels.h"

namespace saw_int4 {
namespace {

void append_kv(const AppendParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    TORCH_CHECK(p.slots[t] < p.num_slots, "append_kv: slots[", t, "] is ", p.slots[t], ", expected less than the ",
                p.num_slots, " slots of the cache, or negative to skip the token");
  }
  const CpuKernels& kernels = cpu_kernels();
  at::parallel_for(0, p.num_tokens * p.num_kv_heads, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(p.head_dim + p.head_dim / 4);
    kernels.append_rows(p, begin, end, scratch.data());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("append_kv", operator_of(append_params, [](const AppendParams& p, const auto&...) { append_kv(p); }));
}

}  // namespace saw_int4
