// decode_attention for one instruction set. Included once per kernels_cpu_*.cpp.
//
// The scale and offset of a token stay outside both products (s: sm_scale, already in q'; c: codes):
//     logit_t = scale_t * (q'.c_t) + offset_t * sum(q') + s * q.mu
//     out     = ( sum_t (p_t * scale_t) * c_t  +  sum_t p_t * offset_t ) / sum_t p_t
// Both sums over channels, q'.c_t and sum(q'), are kept for each group of channels, and so are the weights p_t *
// scale_t. Q.K: a tile of tokens is transposed, so that a lane is a token and q' is broadcast. P.V: a lane is a
// channel, p is broadcast. A group's query rows, kMaxRows at a time, share the unpacking of the codes. Every row's
// arithmetic is independent of the rows beside it. Assumes little-endian words, and a row table that has been checked.
#pragma once

namespace saw_int4::SAW_INT4_ISA {

// Channel, inside its word, of nibble j.
SAW_INT4_INLINE constexpr int channel_of_nibble(int j) {
  return 2 * (j & 3) + (j >> 2);
}

template <int kGroups>
static void decode_prepare_of(const DecodeParams& p, const DecodeScratch& s, int64_t begin, int64_t end) {
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
    using Lanes = Grouped<kGroups>;
    F sum[Lanes::kKinds] = {};
    for (int first = 0; first < p.head_dim; first += Lanes::kKinds * N) {
      for (int kind = 0; kind < Lanes::kKinds; ++kind) {
        const int c = first + kind * N;
        const F scaled = load<F>(q + c) * splat(p.sm_scale);
        store(q + c, scaled);
        sum[kind] += scaled;
      }
    }
    for (int g = 0; g < kGroups; ++g) s.q_sum[i * kGroups + g] = lane_sum(Lanes::lanes_of(sum, g, F{}));
  }
}

static void decode_prepare(const DecodeParams& p, const DecodeScratch& s, int64_t begin, int64_t end) {
  p.groups == 1 ? decode_prepare_of<1>(p, s, begin, end) : decode_prepare_of<2>(p, s, begin, end);
}

// ---- A tile of tokens: where its rows are, its keys word by word, its parameters.
template <int kGroups>
struct Tile {
  int64_t begin = 0;
  int count = 0;
  bool all_seen = false;          // by every row of the chunk
  const uint8_t* k[kTileTokens];  // rows; those past count repeat the first
  const uint8_t* v[kTileTokens];
  uint32_t* k_words = nullptr;  // [D/8 + kGroups, kTileTokens], the parameters last
  alignas(64) float k_scale[kGroups][kTileTokens];
  alignas(64) float k_offset[kGroups][kTileTokens];
  alignas(64) float v_scale[kGroups][kTileTokens];  // 0 past count
  alignas(64) float v_offset[kGroups][kTileTokens];
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

template <int kGroups>
static void load_tile(const DecodeParams& p, const int32_t* slots, int kv_head, Tile<kGroups>& tile) {
  const int64_t row = row_bytes(p.head_dim, kGroups), token = p.num_kv_heads * row;
  const int words = p.head_dim / kCodesPerWord;
  alignas(64) uint32_t v_params[kGroups][kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) {
    const bool real = t < tile.count;
    const int64_t byte = slots[real ? t : 0] * token + kv_head * row;
    tile.k[t] = p.k_cache + byte;
    tile.v[t] = p.v_cache + byte;
    tile.in_range[t] = real ? -1 : 0;
    for (int g = 0; g < kGroups; ++g) v_params[g][t] = real ? load<uint32_t>(tile.v[t] + scale_byte(p.head_dim, g)) : 0;
  }
  for (int t = 0; t < kTileTokens; t += 4) {
    uint32_t* const column = tile.k_words + t;
    int w = 0;
    for (; w + 4 <= words + kGroups; w += 4) {
      const Quad a = load<Quad>(tile.k[t] + 4 * w), b = load<Quad>(tile.k[t + 1] + 4 * w);
      const Quad c = load<Quad>(tile.k[t + 2] + 4 * w), d = load<Quad>(tile.k[t + 3] + 4 * w);
      const Quad ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Quad ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      store(column + (w + 0) * kTileTokens, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
      store(column + (w + 1) * kTileTokens, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
      store(column + (w + 2) * kTileTokens, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
      store(column + (w + 3) * kTileTokens, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
    }
    for (; w < words + kGroups; ++w) {
      for (int i = 0; i < 4; ++i) column[w * kTileTokens + i] = load<uint32_t>(tile.k[t + i] + 4 * w);
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    split_params(tile.k_words + (words + g) * kTileTokens, tile.k_scale[g], tile.k_offset[g]);
    split_params(v_params[g], tile.v_scale[g], tile.v_offset[g]);
  }
}

// ---- Q.K: products[r, group, t] = q'_r . codes_t over the group's channels. q: [D/8, 8 nibbles, kRows].
template <int kGroups, int kRows>
static void multiply_qk(const float* q, const Tile<kGroups>& tile, int words, float* products) {
  constexpr int kVectors = 2 / kGroups;  // of tokens at a time: as many sums in registers for two groups as for one
  for (int t = 0; t < tile.count; t += kVectors * N) {
    F acc[kGroups][kVectors][kRows] = {};
    for (int w = 0; w < words; ++w) {
      U word[kVectors];
      for (int i = 0; i < kVectors; ++i) word[i] = load<U>(tile.k_words + w * kTileTokens + t + i * N);
#pragma GCC unroll 8
      for (int j = 0; j < kCodesPerWord; ++j, q += kRows) {
        const int g = group_of_channel(channel_of_nibble(j), kGroups);
        F c[kVectors];
        for (int i = 0; i < kVectors; ++i) c[i] = codes(word[i] >> (4 * j));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          for (int i = 0; i < kVectors; ++i) acc[g][i][r] = fma(c[i], splat(q[r]), acc[g][i][r]);
        }
      }
    }
    q -= words * kCodesPerWord * kRows;
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) {
        for (int i = 0; i < kVectors; ++i) store(products + (r * kGroups + g) * kTileTokens + t + i * N, acc[g][i][r]);
      }
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

// The nibble that lane l of vector k of such a segment takes of its word.
template <int kWords>
SAW_INT4_INLINE constexpr int segment_nibble(int k, int l) {
  return k * (N / kWords) + l / kWords;
}

// Codes of vector k of such a segment.
template <int kWords, int k>
SAW_INT4_INLINE F segment_codes(U words) {
  if constexpr (kWords == N) {
    return codes(words >> (4 * k));
  } else {
    U bit;
    for (int l = 0; l < N; ++l) bit[l] = 4 * segment_nibble<kWords>(k, l);
    return codes(words >> bit);
  }
}

// What each lane of vector k of such a segment has by its group.
template <int kGroups, int kWords, int k>
SAW_INT4_INLINE F by_segment_group(const F (&of_group)[kGroups]) {
  constexpr int kFirst = group_of_channel(channel_of_nibble(segment_nibble<kWords>(k, 0)), kGroups);
  constexpr int kLast = group_of_channel(channel_of_nibble(segment_nibble<kWords>(k, N - 1)), kGroups);
  if constexpr (N / kWords <= 2) {  // nibbles 2i and 2i + 1 are of one group
    static_assert(kFirst == kLast);
    return of_group[kFirst];
  } else {
    I upper;
    for (int l = 0; l < N; ++l) {
      const int group = group_of_channel(channel_of_nibble(segment_nibble<kWords>(k, l)), kGroups);
      upper[l] = group == kGroups - 1 ? -1 : 0;
    }
    return upper ? of_group[kGroups - 1] : of_group[0];
  }
}

template <int kGroups, int kRows, int kWords, int kFirst, int... kVector>
SAW_INT4_INLINE void multiply_pv_pass(const Tile<kGroups>& tile, int byte, const float* weights, float* const* acc,
                                      std::integer_sequence<int, kVector...>) {
  F sum[kRows][sizeof...(kVector)];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) ((sum[r][kVector] = load<F>(acc[r] + (kFirst + kVector) * N)), ...);
  for (int t = 0; t < tile.count; ++t) {
    const U words = load_words<kWords>(tile.v[t] + byte);
    const F c[] = {segment_codes<kWords, kFirst + kVector>(words)...};
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      F weight[kGroups];
      for (int g = 0; g < kGroups; ++g) weight[g] = splat(weights[(r * kGroups + g) * kTileTokens + t]);
      ((sum[r][kVector] =
            fma(c[kVector], by_segment_group<kGroups, kWords, kFirst + kVector>(weight), sum[r][kVector])),
       ...);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) (store(acc[r] + (kFirst + kVector) * N, sum[r][kVector]), ...);
}

template <int kGroups, int kRows, int kWords, int kFirst = 0>
static void multiply_pv_segment(const Tile<kGroups>& tile, int byte, const float* weights, float* const* acc) {
  constexpr int kVectors = kCodesPerWord * kWords / N;
  if constexpr (kFirst < kVectors) {
    constexpr int kFit = kAccumulators / kRows >= 8 ? 8 : kAccumulators / kRows >= 4 ? 4 : 2;
    constexpr int kPass = kFit < kVectors ? kFit : kVectors;
    multiply_pv_pass<kGroups, kRows, kWords, kFirst>(tile, byte, weights, acc,
                                                     std::make_integer_sequence<int, kPass>{});
    multiply_pv_segment<kGroups, kRows, kWords, kFirst + kPass>(tile, byte, weights, acc);
  }
}

// Calls f.operator()<kWords>(first word) for every segment of a row.
template <int kWords = N, typename Function>
SAW_INT4_INLINE void for_segments(int words, int first, const Function& f) {
  for (; words - first >= kWords; first += kWords) f.template operator()<kWords>(first);
  if constexpr (kWords > 2) for_segments<kWords / 2>(words, first, f);
}

template <int kGroups, int kRows>
static void multiply_pv(const Tile<kGroups>& tile, int words, const float* weights, float* const* acc) {
  for_segments(words, 0, [&]<int kWords>(int first) __attribute__((always_inline)) {
    float* at[kRows];
    for (int r = 0; r < kRows; ++r) at[r] = acc[r] + first * kCodesPerWord;
    multiply_pv_segment<kGroups, kRows, kWords>(tile, 4 * first, weights, at);
  });
}

// ---- Softmax of one row over one tile: products of each group in, weights for P.V out; acc and stats brought up to
// date. stats: largest logit, sum of weights, and for each group the sum of weight * offset of V.
SAW_INT4_INLINE bool token_seen(const DecodeParams& p, const DecodeChunk& chunk, int64_t row, int64_t token) {
  const int64_t position = chunk.first_new + (row - chunk.request_row_begin);
  if (p.window >= 0 && (token > position || token < position - p.window)) return false;
  if (p.tree_mask == nullptr) return token <= position;
  return token < chunk.first_new || ((p.tree_mask[row] >> (token - chunk.first_new)) & 1);
}

template <int kGroups>
static void softmax_step(const DecodeParams& p, const DecodeChunk& chunk, const Tile<kGroups>& tile, int64_t row,
                         const float* q_sum, float q_mean, float* products, float* acc, float* stats) {
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
    F logit = splat(q_mean);
    for (int g = 0; g < kGroups; ++g) {
      logit = fma(load<F>(tile.k_offset[g] + t), splat(q_sum[g]), logit);
      logit = fma(load<F>(products + g * kTileTokens + t), load<F>(tile.k_scale[g] + t), logit);
    }
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
    for (int i = 1; i < 2 + kGroups; ++i) stats[i] *= keep[0];
  }
  const F reference = splat(stats[0] == -INFINITY ? 0.f : stats[0]);  // nothing seen yet: all weights are 0
  F sum{}, offsets[kGroups] = {};
  for (int t = 0; t < tile.count; t += N) {
    const F weight = exp_nonpositive(load<F>(products + t) - reference);
    const I seen = load<I>(mask + t);
    sum += weight;
    for (int g = 0; g < kGroups; ++g) {
      offsets[g] += seen ? weight * load<F>(tile.v_offset[g] + t) : F{};
      store(products + g * kTileTokens + t, seen ? weight * load<F>(tile.v_scale[g] + t) : F{});
    }
  }
  stats[1] += lane_sum(sum);
  for (int g = 0; g < kGroups; ++g) stats[2 + g] += lane_sum(offsets[g]);
}

// ---- One chunk.
template <int kGroups, int kRows>
static void attend_tile(const DecodeParams& p, const DecodeScratch& s, const DecodeChunk& chunk,
                        const Tile<kGroups>& tile, int kv_head, int64_t first, const float* q, float* products) {
  const int group = p.num_q_heads / p.num_kv_heads, words = p.head_dim / kCodesPerWord;
  multiply_qk<kGroups, kRows>(q, tile, words, products);
  float* acc[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = (first + r) / group, head = kv_head * group + (first + r) % group;
    const int64_t query = (chunk.row_begin + i) * p.num_q_heads + head;
    const int64_t partial = chunk.partial_row + i * p.num_q_heads + head;
    acc[r] = s.acc + partial * p.head_dim;
    softmax_step<kGroups>(p, chunk, tile, chunk.row_begin + i, s.q_sum + kGroups * query, s.q_mean[query],
                          products + r * kGroups * kTileTokens, acc[r], s.stats + (2 + kGroups) * partial);
  }
  multiply_pv<kGroups, kRows>(tile, words, products, acc);
}

template <int kGroups, int kRows = kMaxRows, typename... Arguments>
static void attend_tile_rows(int rows, Arguments&&... arguments) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return attend_tile_rows<kGroups, kRows - 1>(rows, arguments...);
  }
  attend_tile<kGroups, kRows>(arguments...);
}

static int64_t decode_scratch_floats(int head_dim, int groups, int64_t rows) {
  const int64_t words = head_dim / kCodesPerWord;
  return 16 + rows * head_dim + (words + groups + groups * kMaxRows) * kTileTokens;
}

template <int kGroups>
static void decode_chunk_of(const DecodeParams& p, const DecodeScratch& s, const DecodeChunk& chunk, int kv_head,
                            float* scratch) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t rows = (chunk.row_end - chunk.row_begin) * group, blocks = (rows + kMaxRows - 1) / kMaxRows;
  const auto block_begin = [&](int64_t block) { return block * rows / blocks; };
  float* const q = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  float* const products = q + rows * p.head_dim;

  Tile<kGroups> tile;
  tile.k_words = reinterpret_cast<uint32_t*>(products + kGroups * kMaxRows * kTileTokens);
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
      float* const stats = s.stats + (2 + kGroups) * partial;
      stats[0] = -INFINITY;
      for (int n = 1; n < 2 + kGroups; ++n) stats[n] = 0.f;
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
      attend_tile_rows<kGroups>(static_cast<int>(block_begin(block + 1) - first), p, s, chunk, tile, kv_head, first,
                                q + first * p.head_dim, products);
    }
  }
}

static void decode_chunk(const DecodeParams& p, const DecodeScratch& s, const DecodeChunk& chunk, int kv_head,
                         float* scratch) {
  p.groups == 1 ? decode_chunk_of<1>(p, s, chunk, kv_head, scratch) : decode_chunk_of<2>(p, s, chunk, kv_head, scratch);
}

// ---- The chunks of one query row and head, in order, then the sink, the way back to V's space, the output.
template <int kGroups>
static void decode_merge_of(const DecodeParams& p, const DecodeScratch& s, const DecodeRows& rows,
                            const DecodeChunk* chunks, int64_t row, int q_head, float* scratch) {
  const int64_t heads = p.num_q_heads;
  const auto partial_row = [&](int64_t c) {
    const DecodeChunk& chunk = chunks[rows.first_chunk + c];
    return chunk.partial_row + (row - chunk.row_begin) * heads + q_head;
  };
  float top = p.sinks != nullptr ? p.sinks[q_head] : -INFINITY;
  for (int64_t c = 0; c < rows.num_chunks; ++c) top = fmaxf(top, s.stats[(2 + kGroups) * partial_row(c)]);
  const float reference = top == -INFINITY ? 0.f : top;
  float sum = p.sinks != nullptr ? expf(p.sinks[q_head] - reference) : 0.f, offset[kGroups] = {};
  float* const acc = scratch;
  float* const out = scratch + p.head_dim;
  __builtin_memset(acc, 0, 4 * p.head_dim);
  for (int64_t i = 0; i < rows.num_chunks; ++i) {
    const int64_t partial = partial_row(i);
    const float* const stats = s.stats + (2 + kGroups) * partial;
    const float weight = expf(stats[0] - reference);
    sum += weight * stats[1];
    for (int g = 0; g < kGroups; ++g) offset[g] += weight * stats[2 + g];
    const float* const from = s.acc + partial * p.head_dim;
    for (int c = 0; c < p.head_dim; c += N) store(acc + c, fma(splat(weight), load<F>(from + c), load<F>(acc + c)));
  }
  const float normal = sum == 0.f ? 0.f : 1.f / sum;
  for_segments(p.head_dim / kCodesPerWord, 0, [&]<int kWords>(int first) {
    const float* from = acc + first * kCodesPerWord;
    for (int k = 0; k < kCodesPerWord * kWords / N; ++k) {
      for (int l = 0; l < N; ++l) {
        const int channel = (first + l % kWords) * kCodesPerWord + channel_of_nibble(segment_nibble<kWords>(k, l));
        out[channel] = (*from++ + offset[group_of_channel(channel, kGroups)]) * normal;
      }
    }
  });
  if (p.transform.rotate_v) hadamard_row(out, p.head_dim, p.transform.rotation_order);
  store_row(p.out, (row * heads + q_head) * p.head_dim, p.dtype, p.head_dim, out);
  if (p.lse != nullptr) p.lse[row * heads + q_head] = sum == 0.f ? -INFINITY : top + logf(sum);
}

static void decode_merge(const DecodeParams& p, const DecodeScratch& s, const DecodeRows& rows,
                         const DecodeChunk* chunks, int64_t row, int q_head, float* scratch) {
  p.groups == 1 ? decode_merge_of<1>(p, s, rows, chunks, row, q_head, scratch)
                : decode_merge_of<2>(p, s, rows, chunks, row, q_head, scratch);
}

}  // namespace saw_int4::SAW_INT4_ISA
