// append_kv, row by row. Included once per kernels_cpu_*.cpp.
#pragma once

namespace saw_int4::SAW_INT4_ISA {

template <int kGroups>
static void append_rows_of(const AppendParams& p, int64_t begin, int64_t end, float* scratch) {
  const TransformParams& tr = p.transform;
  const int64_t row = row_bytes(p.head_dim, kGroups);
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scratch + p.head_dim);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i / p.num_kv_heads, h = i % p.num_kv_heads, slot = p.slots[t];
    if (slot < 0) continue;
    const int64_t channel = h * p.head_dim, byte = (slot * p.num_kv_heads + h) * row;
    load_row(p.k, t * p.k_token_stride + channel, p.dtype, p.head_dim, scratch);
    transform_row(scratch, p.head_dim, tr.rotation_order, tr.k_mean ? tr.k_mean + channel : nullptr,
                  tr.k_inv_scale ? tr.k_inv_scale + channel : nullptr, tr.k_sign ? tr.k_sign + channel : nullptr);
    quantize_row<kGroups>(scratch, p.head_dim, codes, p.k_cache + byte);
    load_row(p.v, t * p.v_token_stride + channel, p.dtype, p.head_dim, scratch);
    if (tr.rotate_v) hadamard_row(scratch, p.head_dim, tr.rotation_order);
    quantize_row<kGroups>(scratch, p.head_dim, codes, p.v_cache + byte);
  }
}

static void append_rows(const AppendParams& p, int64_t begin, int64_t end, float* scratch) {
  p.groups == 1 ? append_rows_of<1>(p, begin, end, scratch) : append_rows_of<2>(p, begin, end, scratch);
}

}  // namespace saw_int4::SAW_INT4_ISA
