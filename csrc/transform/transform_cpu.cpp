// transform_rows on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/row.h"

namespace saw_int4 {
namespace {

void transform_rows(const at::Tensor& x, const at::Tensor& out, int64_t rotation_order, const OptionalTensor& mean,
                    const OptionalTensor& mul) {
  const TransformRowsParams p = transform_rows_params(x, out, rotation_order, mean, mul);
  const int group = p.num_heads / p.num_kv_heads;
  at::parallel_for(0, p.num_tokens * p.num_heads, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / p.num_heads, h = i % p.num_heads, calibrated = h / group * p.head_dim;
      load_row(p.x, t * p.x_token_stride + h * p.head_dim, p.dtype, p.head_dim, row.data());
      transform_row(row.data(), p.head_dim, p.rotation_order, p.mean ? p.mean + calibrated : nullptr,
                    p.mul ? p.mul + calibrated : nullptr);
      store_row(p.y, i * p.head_dim, p.dtype, p.head_dim, row.data());
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("transform_rows", &transform_rows);
}

}  // namespace saw_int4
