// transform_rows on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels.h"

namespace saw_int4 {
namespace {

void transform_rows(const TransformRowsParams& p) {
  const CpuKernels& kernels = cpu_kernels();
  at::parallel_for(0, p.num_tokens * p.num_heads, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(p.head_dim);
    kernels.transform_rows(p, begin, end, scratch.data());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("transform_rows",
         operator_of(transform_rows_params, [](const TransformRowsParams& p, const auto&...) { transform_rows(p); }));
}

}  // namespace saw_int4
