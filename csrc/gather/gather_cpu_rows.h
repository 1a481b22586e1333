// gather_kv, row by row. Included once per kernels_cpu_*.cpp.
#pragma once

namespace saw_int4::SAW_INT4_ISA {

template <int kGroups>
static void gather_rows_of(const GatherParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t row = row_bytes(p.head_dim, kGroups);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slot = p.slots[i / p.num_kv_heads];
    const int64_t byte = (slot * p.num_kv_heads + i % p.num_kv_heads) * row;
    dequantize_row<kGroups>(p.k_cache + byte, p.head_dim, scratch);
    store_row(p.k_out, i * p.head_dim, p.dtype, p.head_dim, scratch);
    dequantize_row<kGroups>(p.v_cache + byte, p.head_dim, scratch);
    store_row(p.v_out, i * p.head_dim, p.dtype, p.head_dim, scratch);
  }
}

static void gather_rows(const GatherParams& p, int64_t begin, int64_t end, float* scratch) {
  p.groups == 1 ? gather_rows_of<1>(p, begin, end, scratch) : gather_rows_of<2>(p, begin, end, scratch);
}

}  // namespace saw_int4::SAW_INT4_ISA
