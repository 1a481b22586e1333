// gather_kv on the CPU: the bit-exact specification of dequantization.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/row.h"

namespace saw_int4 {
namespace {

void gather_kv(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& slots, const at::Tensor& k_out,
               const at::Tensor& v_out) {
  const GatherParams p = gather_params(k_cache, v_cache, slots, k_out, v_out);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    TORCH_CHECK(p.slots[t] >= 0 && p.slots[t] < p.num_slots, "gather_kv: slots[", t, "] is ", p.slots[t],
                ", expected 0 .. ", p.num_slots - 1, ", the slots of the cache");
  }
  const int64_t row = row_bytes(p.head_dim);
  at::parallel_for(0, p.num_tokens * p.num_kv_heads, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> x(p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i % p.num_kv_heads;
      const int64_t byte = (static_cast<int64_t>(p.slots[i / p.num_kv_heads]) * p.num_kv_heads + h) * row;
      dequantize_row(p.k_cache + byte, p.head_dim, x.data());
      store_row(p.k_out, i * p.head_dim, p.dtype, p.head_dim, x.data());
      dequantize_row(p.v_cache + byte, p.head_dim, x.data());
      store_row(p.v_out, i * p.head_dim, p.dtype, p.head_dim, x.data());
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("gather_kv", &gather_kv);
}

}  // namespace saw_int4
