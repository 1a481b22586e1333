// decode_attention on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/row.h"

namespace saw_int4 {
namespace {

void decode_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                      const at::Tensor& slot_table, const at::Tensor& table_rows, const at::Tensor& seq_lens,
                      const OptionalTensor& q_indptr, const at::Tensor& out, const OptionalTensor& lse,
                      const OptionalTensor& workspace, int64_t max_q_len, int64_t page_size, double sm_scale,
                      int64_t rotation_order, bool rotate_v, const OptionalTensor& k_mean,
                      const OptionalTensor& k_scale, double logit_cap, int64_t window, const OptionalTensor& sinks,
                      const OptionalTensor& tree_mask) {
  const DecodeParams p = decode_params(q, k_cache, v_cache, slot_table, table_rows, seq_lens, q_indptr, out, lse,
                                       workspace, max_q_len, page_size, sm_scale, rotation_order, rotate_v, k_mean,
                                       k_scale, logit_cap, window, sinks, tree_mask);
  for (int b = 0; b < p.num_requests; ++b) {
    TORCH_CHECK(p.table_rows[b] >= 0 && p.table_rows[b] < slot_table.size(0), "decode_attention: table_rows[", b,
                "] is ", p.table_rows[b], ", expected 0 .. ", slot_table.size(0) - 1, ", the rows of slot_table");
    TORCH_CHECK(p.seq_lens[b] >= 0 && p.seq_lens[b] <= slot_table.size(1), "decode_attention: seq_lens[", b, "] is ",
                p.seq_lens[b], ", expected 0 .. ", slot_table.size(1), ", the width of slot_table");
    if (p.q_indptr != nullptr) {
      const int64_t rows = p.q_indptr[b + 1] - p.q_indptr[b];
      TORCH_CHECK(p.q_indptr[b] >= 0 && p.q_indptr[b + 1] <= q.size(0) && rows >= 0 && rows <= p.max_q_len,
                  "decode_attention: q_indptr[", b, "] .. [", b + 1, "] is ", p.q_indptr[b], " .. ", p.q_indptr[b + 1],
                  ", expected 0 to max_q_len ", p.max_q_len, " rows of the ", q.size(0), " of q");
    }
    for (int64_t t = 0; t < p.seq_lens[b]; ++t) {
      const int32_t slot = p.slot_table[p.table_rows[b] * p.table_stride + t];
      TORCH_CHECK(slot >= 0 && slot < p.num_slots, "decode_attention: slot_table[", p.table_rows[b], ", ", t, "] is ",
                  slot, ", expected 0 .. ", p.num_slots - 1, ", the slots of the cache");
    }
  }
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t row = row_bytes(p.head_dim);
  const TransformParams& tr = p.transform;
  at::parallel_for(0, static_cast<int64_t>(p.num_requests) * p.num_q_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> query(p.head_dim), x(p.head_dim), acc(p.head_dim);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.num_q_heads, hq = item % p.num_q_heads, h = hq / group;
      const int64_t first = p.q_indptr ? p.q_indptr[b] : b * p.max_q_len;
      const int64_t n = p.q_indptr ? p.q_indptr[b + 1] - first : p.max_q_len;
      const int64_t first_new = p.seq_lens[b] - n;
      for (int64_t i = 0; i < n; ++i) {
        load_row(p.q, (first + i) * p.q_token_stride + hq * p.head_dim, p.dtype, p.head_dim, query.data());
        float mean_score = 0.f;
        for (int c = 0; c < p.head_dim && tr.k_mean; ++c) mean_score += query[c] * tr.k_mean[h * p.head_dim + c];
        transform_row(query.data(), p.head_dim, tr.rotation_order, nullptr,
                      tr.k_scale ? tr.k_scale + h * p.head_dim : nullptr);
        std::fill(acc.begin(), acc.end(), 0.f);
        float top = -INFINITY, sum = 0.f;
        if (p.sinks) {
          top = p.sinks[hq];
          sum = 1.f;
        }
        const int64_t position = first_new + i;
        for (int64_t t = 0; t < p.seq_lens[b]; ++t) {
          bool seen = p.tree_mask && t >= first_new ? (p.tree_mask[first + i] >> (t - first_new)) & 1 : true;
          if (!p.tree_mask || p.window >= 0) seen = seen && t <= position;
          if (p.window >= 0) seen = seen && t >= position - p.window;
          if (!seen) continue;
          const int64_t slot = p.slot_table[p.table_rows[b] * p.table_stride + t];
          dequantize_row(p.k_cache + (slot * p.num_kv_heads + h) * row, p.head_dim, x.data());
          float score = mean_score;
          for (int c = 0; c < p.head_dim; ++c) score += query[c] * x[c];
          score *= p.sm_scale;
          if (p.logit_cap > 0.f) score = p.logit_cap * std::tanh(score / p.logit_cap);
          const float new_top = score > top ? score : top;
          const float keep = top == new_top ? 1.f : std::exp(top - new_top), weight = std::exp(score - new_top);
          dequantize_row(p.v_cache + (slot * p.num_kv_heads + h) * row, p.head_dim, x.data());
          for (int c = 0; c < p.head_dim; ++c) acc[c] = acc[c] * keep + weight * x[c];
          sum = sum * keep + weight;
          top = new_top;
        }
        const int64_t out_row = (first + i) * p.num_q_heads + hq;
        for (float& a : acc) a = sum == 0.f ? 0.f : a / sum;
        transform_row(acc.data(), p.head_dim, tr.rotate_v ? tr.rotation_order : 1, nullptr, nullptr);
        store_row(p.out, out_row * p.head_dim, p.dtype, p.head_dim, acc.data());
        if (p.lse) p.lse[out_row] = sum == 0.f ? -INFINITY : top + std::log(sum);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("decode_attention", &decode_attention);
}

}  // namespace saw_int4
