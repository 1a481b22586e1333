// decode_attention on the CPU: checks values, cuts the work, runs the kernels of the chosen instruction set.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace saw_int4 {
namespace {

int64_t first_row(const DecodeParams& p, int b) {
  return p.q_indptr ? p.q_indptr[b] : int64_t{b} * p.max_q_len;
}
int64_t end_row(const DecodeParams& p, int b) {
  return p.q_indptr ? p.q_indptr[b + 1] : first_row(p, b + 1);
}

// Tokens that the rows row_begin .. row_end - 1 of request b may see: [begin, end).
std::pair<int64_t, int64_t> token_range(const DecodeParams& p, int b, int64_t row_begin, int64_t row_end) {
  const int64_t shift = p.seq_lens[b] - end_row(p, b);  // position = row + shift
  const bool by_position = p.tree_mask == nullptr || p.window >= 0;
  const int64_t end = by_position ? std::max<int64_t>(0, row_end + shift) : p.seq_lens[b];
  const int64_t begin = p.window < 0 ? 0 : std::clamp<int64_t>(row_begin + shift - p.window, 0, end);
  return {begin, end};
}

void check_values(const DecodeParams& p, int64_t table_rows, int64_t table_width, int64_t num_rows) {
  for (int b = 0; b < p.num_requests; ++b) {
    TORCH_CHECK(p.table_rows[b] >= 0 && p.table_rows[b] < table_rows, "decode_attention: table_rows[", b, "] is ",
                p.table_rows[b], ", expected 0 .. ", table_rows - 1, ", the rows of slot_table");
    TORCH_CHECK(p.seq_lens[b] >= 0 && p.seq_lens[b] <= table_width, "decode_attention: seq_lens[", b, "] is ",
                p.seq_lens[b], ", expected 0 .. ", table_width, ", the width of slot_table");
    const int64_t first = first_row(p, b), end = end_row(p, b);
    TORCH_CHECK(first >= 0 && first <= end && end <= num_rows && end - first <= p.max_q_len,
                "decode_attention: q_indptr[", b, "] .. [", b + 1, "] is ", first, " .. ", end,
                ", expected 0 to max_q_len ", p.max_q_len, " rows among the ", num_rows, " of q");
    if (first == end) continue;
    const auto [begin, token_end] = token_range(p, b, first, end);
    const int32_t* const slots = p.slot_table + p.table_rows[b] * p.table_stride;
    bool valid = true;
    for (int64_t t = begin; t < token_end; ++t) valid &= slots[t] >= 0 && slots[t] < p.num_slots;
    if (valid) continue;
    const int32_t* const bad =
        std::find_if(slots + begin, slots + token_end, [&](int32_t slot) { return slot < 0 || slot >= p.num_slots; });
    TORCH_CHECK(false, "decode_attention: slot_table[", p.table_rows[b], ", ", bad - slots, "] is ", *bad,
                ", expected 0 .. ", p.num_slots - 1, ", the slots of the cache");
  }
}

struct Plan {
  std::vector<DecodeChunk> chunks;
  std::vector<DecodeRows> rows;
  int64_t partial_rows = 0;
  int64_t max_rows = 0;  // query rows of one KV head in any chunk
};

// Few query rows: short chunks, so that one request fills many cores. Many: longer ones, as partial results would
// outgrow the cache that they stand for; the rows themselves are cut too.
Plan make_plan(const DecodeParams& p) {
  constexpr int64_t kRowsPerCut = 128;  // times head_dim floats of results: stays in L2
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  const int64_t rows_per_cut = std::max<int64_t>(1, kRowsPerCut / group);
  Plan plan;
  for (int b = 0; b < p.num_requests; ++b) {
    const int64_t first = first_row(p, b), end = end_row(p, b);
    const int64_t chunk_tokens = end - first <= 8 ? 256 : 4096;
    for (int64_t row = first; row < end; row += rows_per_cut) {
      const int64_t row_end = std::min(end, row + rows_per_cut);
      const auto [token_begin, token_end] = token_range(p, b, row, row_end);
      DecodeRows rows{row, row_end, static_cast<int64_t>(plan.chunks.size()), 0};
      for (int64_t t = token_begin; t < token_end; t = (t / chunk_tokens + 1) * chunk_tokens) {
        DecodeChunk chunk;
        chunk.request = b;
        chunk.row_begin = row;
        chunk.row_end = row_end;
        chunk.first_new = p.seq_lens[b] - (end - first);
        chunk.request_row_begin = first;
        chunk.token_begin = t;
        chunk.token_end = std::min(token_end, (t / chunk_tokens + 1) * chunk_tokens);
        chunk.partial_row = plan.partial_rows;
        plan.chunks.push_back(chunk);
        plan.partial_rows += (row_end - row) * p.num_q_heads;
        ++rows.num_chunks;
      }
      plan.rows.push_back(rows);
      plan.max_rows = std::max(plan.max_rows, (row_end - row) * group);
    }
  }
  return plan;
}

void decode_attention(const DecodeParams& p, const at::Tensor& slot_table) {
  check_values(p, slot_table.size(0), slot_table.size(1), p.num_query_rows);
  const Plan plan = make_plan(p);
  const CpuKernels& kernels = cpu_kernels();
  const int64_t queries = p.num_query_rows * p.num_q_heads, D = p.head_dim, G = p.groups;
  const at::Tensor floats = at::empty({queries * (D + G + 1) + plan.partial_rows * (D + G + 2)}, at::kFloat);
  DecodeScratch s;
  s.q = floats.mutable_data_ptr<float>();
  s.q_sum = s.q + queries * D;
  s.q_mean = s.q_sum + queries * G;
  s.acc = s.q_mean + queries;
  s.stats = s.acc + plan.partial_rows * D;

  at::parallel_for(0, queries, 64, [&](int64_t begin, int64_t end) { kernels.decode_prepare(p, s, begin, end); });
  // KV heads innermost: a token's heads lie side by side, and what one head's rows drag into the cache serves the next.
  at::parallel_for(0, plan.chunks.size() * p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kernels.decode_scratch_floats(p.head_dim, p.groups, plan.max_rows));
    for (int64_t i = begin; i < end; ++i) {
      kernels.decode_chunk(p, s, plan.chunks[i / p.num_kv_heads], static_cast<int>(i % p.num_kv_heads), scratch.data());
    }
  });
  for (const DecodeRows& rows : plan.rows) {
    at::parallel_for(0, (rows.row_end - rows.row_begin) * p.num_q_heads, 64, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(2 * D);
      for (int64_t i = begin; i < end; ++i) {
        kernels.decode_merge(p, s, rows, plan.chunks.data(), rows.row_begin + i / p.num_q_heads,
                             static_cast<int>(i % p.num_q_heads), scratch.data());
      }
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(saw_int4, CPU, m) {
  m.impl("decode_attention",
         operator_of(decode_params, [](const DecodeParams& p, const at::Tensor& q, const at::Tensor& k_cache,
                                       const at::Tensor& v_cache, const at::Tensor& slot_table,
                                       const auto&...) { decode_attention(p, slot_table); }));
}

}  // namespace saw_int4
