// transform_rows, row by row. Included once per kernels_cpu_*.cpp.
#pragma once

namespace saw_int4::SAW_INT4_ISA {

static void transform_rows(const TransformRowsParams& p, int64_t begin, int64_t end, float* scratch) {
  const int group = p.num_heads / p.num_kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i / p.num_heads, h = i % p.num_heads, channel = h / group * p.head_dim;
    load_row(p.x, t * p.x_token_stride + h * p.head_dim, p.dtype, p.head_dim, scratch);
    transform_row(scratch, p.head_dim, p.rotation_order, p.mean ? p.mean + channel : nullptr,
                  p.mul ? p.mul + channel : nullptr, p.sign ? p.sign + channel : nullptr);
    store_row(p.y, i * p.head_dim, p.dtype, p.head_dim, scratch);
  }
}

}  // namespace saw_int4::SAW_INT4_ISA
