// append_kv on the CPU: the bit-exact specification of the bytes.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels.h"

namespace saw_int4 {
namespace {

void append_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
               const at::Tensor& slots, int64_t rotation_order, bool rotate_v, const OptionalTensor& k_mean,
               const OptionalTensor& k_inv_scale, const OptionalTensor& k_sign) {
  const AppendParams p =
      append_params(k, v, k_cache, v_cache, slots, rotation_order, rotate_v, k_mean, k_inv_scale, k_sign);
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
  m.impl("append_kv", &append_kv);
}

}  // namespace saw_int4
