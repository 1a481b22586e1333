// decode_attention for one instruction set. Included once per kernels_cpu_*.cpp.
//
// The scale and offset of a token stay outside both products (s: sm_scale, already in q'; c: codes):
//     logit_t = scale_t * (q'.c_t) + offset_t * sum(q') + s * q.mu
//     out     = ( sum_t (p_t * scale_t) * c_t  +  sum_t p_t * offset_t ) / sum_t p_t
// Q.K: a tile of tokens is transposed, so that a lane is a token and q' is broadcast. P.V: a lane is a channel, p is
// broadcast. A group's query rows, kMaxRows at a time, share the unpacking of the codes. Every row's arithmetic is
// independent of the rows beside it.
// Assumes little-endian words, and a row table that has been checked.
#pragma once

namespace saw_int4::SAW_INT4_ISA {

// Channel, inside its word, of nibble j.
SAW_INT4_INLINE constexpr int channel_of_nibble(int j) {
  return 2 * (j & 3) + (j >> 2);
}

static void decode_prepare(const DecodeParams& p, const DecodeScratch& s, int64_t begin, int64_t end) {
  const TransformParams& tr = p.transform;
  const int group = p.num_q_heads / p.num_kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / p.num_q_heads, head = i % p.num_q_heads, channel = head / group * p.head_dim;
    float* const q = s.q + i * p.head_dim;
    load_row(p.q, row * p.q_token_stride + head * p.head_dim, p.dtype, p.head_dim, q);
    F mean{};
    if (tr.k_mean != nullptr) {
      for (int c = 0; c < p.head_dim; c += N) mean = fma(load<F>(q + c), load<F>(tr.k_mean + channel + c), mean);
    }
    s.q_mean[i] = p.sm_scale * lane_sum(mean);
    transform_row(q, p.head_dim, tr.rotation_order, nullptr, tr.k_scale ? tr.k_scale + channel : nullptr,
                  tr.k_sign ? tr.k_sign + channel : nullptr);
    F sum{};
    for (int c = 0; c < p.head_dim; c += N) {
      const F scaled = load<F>(q + c) * splat(p.sm_scale);
      store(q + c, scaled);
      sum += scaled;
    }
    s.q_sum[i] = lane_sum(sum);
  }
}

// ---- A tile of tokens: where its rows are, its keys word by word, its parameters.
struct Tile {
  int64_t begin = 0;
  int count = 0;
  bool all_seen = false;          // by every row of the chunk
  const uint8_t* k[kTileTokens];  // rows; those past count repeat the first
  const uint8_t* v[kTileTokens];
  uint32_t* k_words = nullptr;  // [D/8 + 1, kTileTokens], the parameters last
  alignas(64) float k_scale[kTileTokens];
  alignas(64) float k_offset[kTileTokens];
  alignas(64) float v_scale[kTileTokens];  // 0 past count
  alignas(64) float v_offset[kTileTokens];
  alignas(64) int32_t in_range[kTileTokens];  // -1 before count, 0 past it
};

SAW_INT4_INLINE void split_params(const uint32_t* words, float* scale, float* offset) {
  for (int t = 0; t < kTileTokens; t += N) {
    const U w = load<U>(words + t);
    store(scale + t, from_half(__builtin_convertvector(w & 0xffffu, H)));
    store(offset + t, from_half(__builtin_convertvector(w >> 16, H)));
  }
}

typedef uint32_t Quad __attribute__((vector_size(16)));

static void load_tile(const DecodeParams& p, const int32_t* slots, int kv_head, Tile& tile) {
  const int64_t row = row_bytes(p.head_dim), token = p.num_kv_heads * row;
  const int words = p.head_dim / kCodesPerWord;
  alignas(64) uint32_t v_params[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) {
    const bool real = t < tile.count;
    const int64_t byte = slots[real ? t : 0] * token + kv_head * row;
    tile.k[t] = p.k_cache + byte;
    tile.v[t] = p.v_cache + byte;
    tile.in_range[t] = real ? -1 : 0;
    v_params[t] = real ? load<uint32_t>(tile.v[t] + scale_byte(p.head_dim)) : 0;
  }
  for (int t = 0; t < kTileTokens; t += 4) {
    uint32_t* const column = tile.k_words + t;
    int w = 0;
    for (; w + 4 <= words + 1; w += 4) {
      const Quad a = load<Quad>(tile.k[t] + 4 * w), b = load<Quad>(tile.k[t + 1] + 4 * w);
      const Quad c = load<Quad>(tile.k[t + 2] + 4 * w), d = load<Quad>(tile.k[t + 3] + 4 * w);
      const Quad ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Quad ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      store(column + (w + 0) * kTileTokens, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
      store(column + (w + 1) * kTileTokens, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
      store(column + (w + 2) * kTileTokens, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
      store(column + (w + 3) * kTileTokens, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
    }
    for (; w < words + 1; ++w) {
      for (int i = 0; i < 4; ++i) column[w * kTileTokens + i] = load<uint32_t>(tile.k[t + i] + 4 * w);
    }
  }
  split_params(tile.k_words + words * kTileTokens, tile.k_scale, tile.k_offset);
  split_params(v_params, tile.v_scale, tile.v_offset);
}

// ---- Q.K: products[r, t] = q'_r . codes_t. q: [D/8, 8 nibbles, kRows].
template <int kRows>
static void multiply_qk(const float* q, const Tile& tile, int words, float* products) {
  for (int t = 0; t < tile.count; t += 2 * N) {
    F acc[2][kRows] = {};
    for (int w = 0; w < words; ++w) {
      const U word0 = load<U>(tile.k_words + w * kTileTokens + t);
      const U word1 = load<U>(tile.k_words + w * kTileTokens + t + N);
#pragma GCC unroll 8
      for (int j = 0; j < kCodesPerWord; ++j, q += kRows) {
        const F codes0 = codes(word0 >> (4 * j)), codes1 = codes(word1 >> (4 * j));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          acc[0][r] = fma(codes0, splat(q[r]), acc[0][r]);
          acc[1][r] = fma(codes1, splat(q[r]), acc[1][r]);
        }
      }
    }
    q -= words * kCodesPerWord * kRows;
    for (int r = 0; r < kRows; ++r) {
      store(products + r * kTileTokens + t, acc[0][r]);
      store(products + r * kTileTokens + t + N, acc[1][r]);
    }
  }
}

// ---- P.V. The D/8 words of a row are taken N, or else the largest power of two that is left, at a time: kWords words
// fill the N lanes N/kWords times over, each copy with another nibble, so that no lane idles for any head_dim.
template <int kWords>
SAW_INT4_INLINE U load_words(const uint8_t* p) {
  if constexpr (kWords == N) {
    return load<U>(p);
#if defined(SAW_INT4_AVX512)
  } else if constexpr (kWords == N / 2) {
    return (U)_mm512_broadcast_i64x4(load<__m256i>(p));
#elif defined(SAW_INT4_AVX2)
  } else if constexpr (kWords == N / 2) {
    return (U)_mm256_broadcastsi128_si256(load<__m128i>(p));
#endif
  } else {
    uint32_t few[kWords];
    __builtin_memcpy(few, p, sizeof(few));
    U words;
    for (int l = 0; l < N; ++l) words[l] = few[l % kWords];
    return words;
  }
}

// Codes of vector k of such a segment.
template <int kWords, int k>
SAW_INT4_INLINE F segment_codes(U words) {
  if constexpr (kWords == N) {
    return codes(words >> (4 * k));
  } else {
    U bit;
    for (int l = 0; l < N; ++l) bit[l] = 4 * (k * (N / kWords) + l / kWords);
    return codes(words >> bit);
  }
}

template <int kRows, int kWords, int kFirst, int... kVector>
SAW_INT4_INLINE void multiply_pv_pass(const Tile& tile, int byte, const float* weights, float* const* acc,
                                      std::integer_sequence<int, kVector...>) {
  F sum[kRows][sizeof...(kVector)];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) ((sum[r][kVector] = load<F>(acc[r] + (kFirst + kVector) * N)), ...);
  for (int t = 0; t < tile.count; ++t) {
    const U words = load_words<kWords>(tile.v[t] + byte);
    const F c[] = {segment_codes<kWords, kFirst + kVector>(words)...};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F weight = splat(weights[r * kTileTokens + t]);
      ((sum[r][kVector] = fma(c[kVector], weight, sum[r][kVector])), ...);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) (store(acc[r] + (kFirst + kVector) * N, sum[r][kVector]), ...);
}

template <int kRows, int kWords, int kFirst = 0>
static void multiply_pv_segment(const Tile& tile, int byte, const float* weights, float* const* acc) {
  constexpr int kVectors = kCodesPerWord * kWords / N;
  if constexpr (kFirst < kVectors) {
    constexpr int kFit = kAccumulators / kRows >= 8 ? 8 : kAccumulators / kRows >= 4 ? 4 : 2;
    constexpr int kPass = kFit < kVectors ? kFit : kVectors;
    multiply_pv_pass<kRows, kWords, kFirst>(tile, byte, weights, acc, std::make_integer_sequence<int, kPass>{});
    multiply_pv_segment<kRows, kWords, kFirst + kPass>(tile, byte, weights, acc);
  }
}

// Calls f.operator()<kWords>(first word) for every segment of a row.
template <int kWords = N, typename Function>
SAW_INT4_INLINE void for_segments(int words, int first, const Function& f) {
  for (; words - first >= kWords; first += kWords) f.template operator()<kWords>(first);
  if constexpr (kWords > 2) for_segments<kWords / 2>(words, first, f);
}

template <int kRows>
static void multiply_pv(const Tile& tile, int words, const float* weights, float* const* acc) {
  for_segments(words, 0, [&]<int kWords>(int first) __attribute__((always_inline)) {
    float* at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = acc[r] + first * kCodesPerWord;
    multiply_pv_segment<kRows, kWords>(tile, 4 * first, weights, at);
  });
}

// ---- Softmax of one row over one tile: products in, weights for P.V out; acc and stats brought up to date.
SAW_INT4_INLINE bool token_seen(const DecodeParams& p, const DecodeChunk& chunk, int64_t row, int64_t token) {
  const int64_t position = chunk.first_new + (row - chunk.request_row_begin);
  if (p.window >= 0 && (token > position || token < position - p.window)) return false;
  if (p.tree_mask == nullptr) return token <= position;
  return token < chunk.first_new || ((p.tree_mask[row] >> (token - chunk.first_new)) & 1);
}

static void softmax_step(const DecodeParams& p, const DecodeChunk& chunk, const Tile& tile, int64_t row, float q_sum,
                         float q_mean, float* products, float* acc, float* stats) {
  alignas(64) int32_t row_mask[kTileTokens];
  const int32_t* mask = tile.in_range;
  if (!tile.all_seen) {
    for (int t = 0; t < kTileTokens; ++t) {
      row_mask[t] = t < tile.count && token_seen(p, chunk, row, tile.begin + t) ? -1 : 0;
    }
    mask = row_mask;
  }
  F tops = splat(-INFINITY);
  for (int t = 0; t < tile.count; t += N) {
    const F constant = fma(load<F>(tile.k_offset + t), splat(q_sum), splat(q_mean));
    F logit = fma(load<F>(products + t), load<F>(tile.k_scale + t), constant);
    if (p.logit_cap > 0.f) logit = splat(p.logit_cap) * tanh(logit / splat(p.logit_cap));
    logit = load<I>(mask + t) ? logit : splat(-INFINITY);
    tops = max(logit, tops);  // a NaN logit does not become the maximum: its weight carries it on
    store(products + t, logit);
  }
  const float top = lane_max(tops);
  if (top > stats[0]) {
    const F keep = exp_nonpositive(splat(stats[0] - top));
    for (int c = 0; c < p.head_dim; c += N) store(acc + c, load<F>(acc + c) * keep);
    stats[0] = top;
    stats[1] *= keep[0];
    stats[2] *= keep[0];
  }
  const F reference = splat(stats[0] == -INFINITY ? 0.f : stats[0]);  // nothing seen yet: all weights are 0
  F sum{}, offsets{};
  for (int t = 0; t < tile.count; t += N) {
    const F weight = exp_nonpositive(load<F>(products + t) - reference);
    const I seen = load<I>(mask + t);
    sum += weight;
    offsets += seen ? weight * load<F>(tile.v_offset + t) : F{};
    store(products + t, seen ? weight * load<F>(tile.v_scale + t) : F{});
  }
  stats[1] += lane_sum(sum);
  stats[2] += lane_sum(offsets);
}

// ---- One chunk.
template <int kRows>
static void attend_tile(const DecodeParams& p, const DecodeScratch& s, const DecodeChunk& chunk, const Tile& tile,
                        int kv_head, int64_t first, const float* q, float* products) {
  const int group = p.num_q_heads / p.num_kv_heads, words = p.head_dim / kCodesPerWord;
  multiply_qk<kRows>(q, tile, words, products);
  float* acc[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = (first + r) / group, head = kv_head * group + (first + r) % group;
    const int64_t query = (chunk.row_begin + i) * p.num_q_heads + head;
    const int64_t partial = chunk.partial_row + i * p.num_q_heads + head;
    acc[r] = s.acc + partial * p.head_dim;
    softmax_step(p, chunk, tile, chunk.row_begin + i, s.q_sum[query], s.q_mean[query], products + r * kTileTokens,
                 acc[r], s.stats + 3 * partial);
  }
  multiply_pv<kRows>(tile, words, products, acc);
}

template <int kRows = kMaxRows, typename... Arguments>
static void attend_tile_rows(int rows, Arguments&&... arguments) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return attend_tile_rows<kRows - 1>(rows, arguments...);
  }
  attend_tile<kRows>(arguments...);
}

static int64_t decode_scratch_floats(int head_dim, int64_t rows) {
  const int64_t words = head_dim / kCodesPerWord;
  return 16 + rows * head_dim + (words + 1 + kMaxRows) * kTileTokens;
}

static void decode_chunk(const DecodeParams& p, const DecodeScratch& s, const DecodeChunk& chunk, int kv_head,
                         float* scratch) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t rows = (chunk.row_end - chunk.row_begin) * group, blocks = (rows + kMaxRows - 1) / kMaxRows;
  const auto block_begin = [&](int64_t block) { return block * rows / blocks; };
  float* const q = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  float* const products = q + rows * p.head_dim;

  Tile tile;
  tile.k_words = reinterpret_cast<uint32_t*>(products + kMaxRows * kTileTokens);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block_begin(block), count = block_begin(block + 1) - first;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = (first + r) / group, head = kv_head * group + (first + r) % group;
      const float* const from = s.q + ((chunk.row_begin + i) * p.num_q_heads + head) * p.head_dim;
      float* const to = q + first * p.head_dim + r;
      for (int c = 0; c < p.head_dim; ++c) {
        const int w = c / kCodesPerWord, j = c % kCodesPerWord;
        to[c * count] = from[w * kCodesPerWord + channel_of_nibble(j)];
      }
      const int64_t partial = chunk.partial_row + i * p.num_q_heads + head;
      __builtin_memset(s.acc + partial * p.head_dim, 0, 4 * p.head_dim);
      s.stats[3 * partial] = -INFINITY;
      s.stats[3 * partial + 1] = s.stats[3 * partial + 2] = 0.f;
    }
  }

  const int64_t first_position = chunk.first_new + (chunk.row_begin - chunk.request_row_begin);
  const int64_t last_position = chunk.first_new + (chunk.row_end - 1 - chunk.request_row_begin);
  const int64_t seen_by_all = p.tree_mask != nullptr ? chunk.first_new : first_position + 1;
  const int32_t* const slots = p.slot_table + p.table_rows[chunk.request] * p.table_stride;
  for (int64_t t = chunk.token_begin, next; t < chunk.token_end; t = next) {
    next = (t / kTileTokens + 1) * kTileTokens;
    next = next < chunk.token_end ? next : chunk.token_end;
    tile.begin = t;
    tile.count = static_cast<int>(next - t);
    tile.all_seen = next <= seen_by_all && (p.window < 0 || t >= last_position - p.window);
    load_tile(p, slots + t, kv_head, tile);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block_begin(block);
      attend_tile_rows(static_cast<int>(block_begin(block + 1) - first), p, s, chunk, tile, kv_head, first,
                       q + first * p.head_dim, products);
    }
  }
}

// ---- The chunks of one query row and head, in order, then the sink, the way back to V's space, the output.
static void decode_merge(const DecodeParams& p, const DecodeScratch& s, const DecodeRows& rows,
                         const DecodeChunk* chunks, int64_t row, int q_head, float* scratch) {
  const int64_t heads = p.num_q_heads;
  const auto partial_row = [&](int64_t c) {
    const DecodeChunk& chunk = chunks[rows.first_chunk + c];
    return chunk.partial_row + (row - chunk.row_begin) * heads + q_head;
  };
  float top = p.sinks != nullptr ? p.sinks[q_head] : -INFINITY;
  for (int64_t c = 0; c < rows.num_chunks; ++c) top = fmaxf(top, s.stats[3 * partial_row(c)]);
  const float reference = top == -INFINITY ? 0.f : top;
  float sum = p.sinks != nullptr ? expf(p.sinks[q_head] - reference) : 0.f, offset = 0.f;
  float* const acc = scratch;
  float* const out = scratch + p.head_dim;
  __builtin_memset(acc, 0, 4 * p.head_dim);
  for (int64_t i = 0; i < rows.num_chunks; ++i) {
    const int64_t partial = partial_row(i);
    const float* const stats = s.stats + 3 * partial;
    const float weight = expf(stats[0] - reference);
    sum += weight * stats[1];
    offset += weight * stats[2];
    const float* const from = s.acc + partial * p.head_dim;
    for (int c = 0; c < p.head_dim; c += N) store(acc + c, fma(splat(weight), load<F>(from + c), load<F>(acc + c)));
  }
  const float normal = sum == 0.f ? 0.f : 1.f / sum;
  for_segments(p.head_dim / kCodesPerWord, 0, [&]<int kWords>(int first) {
    const float* from = acc + first * kCodesPerWord;
    for (int k = 0; k < kCodesPerWord * kWords / N; ++k) {
      for (int l = 0; l < N; ++l) {
        const int channel = (first + l % kWords) * kCodesPerWord + channel_of_nibble(k * (N / kWords) + l / kWords);
        out[channel] = (*from++ + offset) * normal;
      }
    }
  });
  if (p.transform.rotate_v) hadamard_row(out, p.head_dim, p.transform.rotation_order);
  store_row(p.out, (row * heads + q_head) * p.head_dim, p.dtype, p.head_dim, out);
  if (p.lse != nullptr) p.lse[row * heads + q_head] = sum == 0.f ? -INFINITY : top + logf(sum);
}

}  // namespace saw_int4::SAW_INT4_ISA
