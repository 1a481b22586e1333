// What every kernel is called with: plain structs, shapes beside pointers. Knows no framework.
//
// Letters: T tokens, B requests, H_q query heads, H_kv KV heads (H_q % H_kv == 0), D head_dim, R rotation order.
#pragma once

#include <cstdint>

namespace saw_int4 {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// The exact transform of keys, K' = sign * H_R((K - mean) / scale), and of values, H_R(V) when rotate_v.
// mean, scale, inv_scale, sign: fp32 [H_kv, D], all or none null.
struct TransformParams {
  int rotation_order = 0;              // R; 0 or 1: none
  bool rotate_v = false;               // V gets the same rotation (never mean or scale)
  const float* k_mean = nullptr;       // mu
  const float* k_scale = nullptr;      // s, multiplies q
  const float* k_inv_scale = nullptr;  // 1/s, multiplies K - mu
  const float* k_sign = nullptr;       // +1 or -1, multiplies H_R(..) of keys and of queries
};

// K, V [T, H_kv, D] -> rows of k_cache, v_cache [num_slots, H_kv, row_bytes(D, groups)] at slots[T].
struct AppendParams {
  const void* k = nullptr;  // [T, H_kv, D], last two dimensions contiguous
  const void* v = nullptr;
  int64_t k_token_stride = 0;  // elements between tokens
  int64_t v_token_stride = 0;
  DType dtype = DType::kBFloat16;
  uint8_t* k_cache = nullptr;
  uint8_t* v_cache = nullptr;
  int64_t num_slots = 0;
  const int64_t* slots = nullptr;  // [T]; negative: the token is skipped
  int64_t num_tokens = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int groups = 1;
  TransformParams transform;
};

// Attention of the new query rows of B requests over their cached rows. Request b owns the query rows
// q_indptr[b] .. q_indptr[b+1] (or b*max_q_len .. (b+1)*max_q_len when q_indptr is null); they are its last
// tokens, already appended. Its token t lies at slot_table[table_rows[b], t], 0 <= t < seq_lens[b].
struct DecodeParams {
  const void* q = nullptr;  // [T_q, H_q, D], last two dimensions contiguous
  int64_t q_token_stride = 0;
  DType dtype = DType::kBFloat16;    // of q and out
  void* out = nullptr;               // [T_q, H_q, D] contiguous
  float* lse = nullptr;              // [T_q, H_q], natural log, or null
  const uint8_t* k_cache = nullptr;  // [num_slots, H_kv, row_bytes(D, groups)]
  const uint8_t* v_cache = nullptr;
  int64_t num_slots = 0;
  const int32_t* slot_table = nullptr;  // [table_rows_total, table_stride]
  int64_t table_stride = 0;
  const int64_t* table_rows = nullptr;  // [B]
  const int64_t* seq_lens = nullptr;    // [B], the new tokens included
  const int32_t* q_indptr = nullptr;    // [B + 1] or null
  int64_t num_query_rows = 0;           // T_q
  int num_requests = 0;
  int max_q_len = 1;
  int page_size = 1;  // slots of tokens p*page_size .. (p+1)*page_size - 1 are consecutive
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  TransformParams transform;
  float sm_scale = 0.f;                // multiplies q.k
  float logit_cap = 0.f;               // > 0: logits = cap * tanh(logits / cap)
  int64_t window = -1;                 // >= 0: token t is seen from position p when p - window <= t <= p
  const float* sinks = nullptr;        // [H_q] extra logits in the denominator, or null
  const int64_t* tree_mask = nullptr;  // [T_q] bit j: the row sees new token j of its request; null: causal
  void* workspace = nullptr;           // CUDA only: decode_workspace_bytes() bytes, zero before its first use
  int64_t workspace_bytes = 0;
  bool batch_invariant = false;  // CUDA only (the CPU always is): sums of a request do not depend on the batch
  int groups = 1;                // of the caches' rows
};

// Rows at slots[N] -> dequantized, still transformed K and V [N, H_kv, D].
struct GatherParams {
  const uint8_t* k_cache = nullptr;
  const uint8_t* v_cache = nullptr;
  int64_t num_slots = 0;
  const int32_t* slots = nullptr;  // [N], as in a row of the slot table
  int64_t num_tokens = 0;
  void* k_out = nullptr;  // [N, H_kv, D] contiguous
  void* v_out = nullptr;
  DType dtype = DType::kBFloat16;
  int num_kv_heads = 0;
  int head_dim = 0;
  int groups = 1;
};

// y = sign * H_R((x - mean) * mul) row by row: queries, fresh keys, and the way back for outputs (H_R is its own
// inverse).
struct TransformRowsParams {
  const void* x = nullptr;  // [T, H, D], last two dimensions contiguous
  int64_t x_token_stride = 0;
  void* y = nullptr;  // [T, H, D] contiguous; may be x when x is contiguous
  DType dtype = DType::kBFloat16;
  int64_t num_tokens = 0;
  int num_heads = 0;  // H, a multiple of num_kv_heads
  int num_kv_heads = 0;
  int head_dim = 0;
  int rotation_order = 0;
  const float* mean = nullptr;  // [H_kv, D] or null
  const float* mul = nullptr;   // [H_kv, D] or null
  const float* sign = nullptr;  // [H_kv, D] or null
};

}  // namespace saw_int4
