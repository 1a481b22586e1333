// How decode_attention is cut into work on the CPU. The cut of a request depends on that request alone, and partial
// results are merged in a fixed order: neither the batch nor the number of threads changes a bit of the result.
#pragma once

#include <cstdint>

#include "params.h"

namespace saw_int4 {

inline constexpr int kTileTokens = 64;  // tokens whose scores are formed before the next softmax step

// Query rows row_begin .. row_end - 1 of one request against its tokens token_begin .. token_end - 1.
struct DecodeChunk {
  int request = 0;
  int64_t row_begin = 0, row_end = 0;  // rows of q
  int64_t first_new = 0;               // position of the request's first query row
  int64_t request_row_begin = 0;       // its row of q
  int64_t token_begin = 0, token_end = 0;
  int64_t partial_row = 0;  // where its rows start in the partial results: row (i, head) lies at
                            // partial_row + i * H_q + head
};

// Rows of q that are merged from the same chunks.
struct DecodeRows {
  int64_t row_begin = 0, row_end = 0;
  int64_t first_chunk = 0, num_chunks = 0;
};

// Scratch of the whole call. D = head_dim, P = partial rows, G = groups of a row.
struct DecodeScratch {
  float* q = nullptr;       // [T_q, H_q, D] transformed queries times sm_scale
  float* q_sum = nullptr;   // [T_q, H_q, G] their sums over the channels of each group
  float* q_mean = nullptr;  // [T_q, H_q] sm_scale * q.mu
  float* acc = nullptr;     // [P, D] sum of weight * scale * code of V, in the order of accumulated_channel()
  float* stats = nullptr;   // [P, 2 + G] largest logit, sum of weights, for each group sum of weight * offset of V
};

}  // namespace saw_int4
