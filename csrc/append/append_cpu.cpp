// append_kv on the CPU: the bit-exact specification of the bytes.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/row.h"

namespace saw_int4 {
namespace {

void append_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
               const at::Tensor& slots, int64_t rotation_order, bool rotate_v, const OptionalTensor& k_mean,
               const OptionalTensor& k_inv_scale) {
  const AppendParams p = append_params(k, v, k_cache, v_cache, slots, rotation_order, rotate_v, k_mean, k_inv_scale);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    TORCH_CHECK(p.slots[t] < p.num_slots, "append_kv: slots[", t, "] is ", p.slots[t], ", expected less than the ",
                p.num_slots, " slots of the cache, or negative to skip the token");
  }
  const int64_t row = row_bytes(p.head_dim);
  at::parallel_for(0, p.num_tokens * p.num_kv_heads, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> x(p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / p.num_kv_heads, h = i % p.num_kv_heads, slot = p.slots[t];
      if (slot < 0) continue;
      const int64_t calibrated = h * p.head_dim;
      const TransformParams& tr = p.transform;
      load_row(p.k, t * p.k_token_stride + h * p.head_dim, p.dtype, p.head_dim, x.data());
      transform_row(x.data(), p.head_dim, tr.rotation_order, tr.k_mean ? tr.k_mean + calibrated : nullptr,
                    tr.k_inv_scale ? tr.k_inv_scale + calibrated : nullptr);
      quantize_row(x.data(), p.head_dim, p.k_cache + (slot * p.num_kv_heads + h) * row);
      load_row(p.v, t * p.v_token_stride + h * p.head_dim, p.dtype, p.head_dim, x.data());
      transform_row(x.data(), p.head_dim, tr.rotate_v ? tr.rotation_order : 1, nullptr, nullptr);
      quantize_row(x.data(), p.head_dim, p.v_cache + (slot * p.num_kv_heads + h) * row);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("append_kv", &append_kv);
}

}  // namespace saw_int4
