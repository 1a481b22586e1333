// O = softmax(scale * q K^T) V over INT4 rows, for the last query rows of every request, in one launch.
//
// Tokens are the M side of both products: S^T = K q'^T and O^T = V^T P^T, so that 8 query rows (one decode step of a
// GQA group) fill an MMA, and 4 query tokens cost the KV traffic of one. A warp owns one KV head and 32 tokens per
// tile; lane = 4g + c holds, for QK, tokens g and g + 8 and every fourth word of them; for PV, tokens 2c, 2c+1, 2c+8,
// 2c+9 and word g of every eight: two byte permutes put the codes of two tokens side by side. S^T becomes the operand
// P^T by one 8x8 transpose per 16 tokens. Scales stay outside the products (query.cuh, fragments.cuh). With two groups
// per row each has a product and weights of its own: k-steps of QK and MMAs of PV alternate between groups by
// format.h's choice of channels, so that loads and MMAs are as many as for one.
//
// Bound: HBM. A head_dim 128 row pair of 32 tokens is 4352 bytes, 300 cycles of an H100 SM's share (14.5 B/cycle) =
// 1200 issue slots; the inner loop issues about 500 (csrc/README.md counts them in the SASS).
// Assumes: q, out 16-byte aligned rows of fp16 or bf16; cache base 16-byte aligned; workspace counters zero.
#pragma once

#include "decode/merge.cuh"
#include "decode/pipeline.cuh"

namespace saw_int4 {

// A row's reference m moves only when a logit exceeds it by this much: weights are below 2^kSlack, and their products
// with scales in units of v_unit below 2^15.
inline constexpr float kSlack = 4.f;
inline constexpr int kWeightBits = 11;

// Running softmax of a warp's query rows: lane 4g + c, rows 8*nt + 2c + u. l and extra are this lane's share (its
// tokens only). o counts v in units of v_cap * 2^-kWeightBits times (code - 8); extra has what is the same in every
// channel of a group.
template <int D, int NT, int kGroups>
struct Softmax {
  static constexpr int kWordGroups = (D + 63) / 64;  // of 8 words, one per g
  float m[NT][2], l[NT][2], extra[kGroups][NT][2];
  float o[NT][4 * kWordGroups][4];
  float v_cap;  // power of two above every scale of V so far, 0 before the first

  // 2^kWeightBits / v_cap: brings p * scale into fp16's normal range, whatever the scale.
  SAW_INT4_DEVICE float v_unit() const {
    return dev::bits_float((static_cast<uint32_t>(254 + kWeightBits) << 23) - dev::float_bits(v_cap));
  }
};

template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void reset(Softmax<D, NT, kGroups>& s) {
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      s.m[nt][u] = -INFINITY;
      s.l[nt][u] = 0.f;
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) s.extra[group][nt][u] = 0.f;
    }
    SAW_INT4_UNROLL
    for (int i = 0; i < 4 * s.kWordGroups; ++i) {
      SAW_INT4_UNROLL
      for (int e = 0; e < 4; ++e) s.o[nt][i][e] = 0.f;
    }
  }
  s.v_cap = 0.f;
}

// Moves the references (largest logit, largest scale of V) to what the warp has seen. Rare after the first tiles.
template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void rescale(Softmax<D, NT, kGroups>& s, const float (&largest)[NT][2], float v_scale) {
  SAW_INT4_UNROLL
  for (int mask = 4; mask < 32; mask *= 2) v_scale = dev::fmax(v_scale, dev::shfl_xor(v_scale, mask));
  float v_keep = 1.f;
  if (v_scale >= s.v_cap && v_scale > 0.f) {  // the same in all lanes
    const uint32_t exponent = (dev::float_bits(v_scale) >> 23) + 1;
    v_keep = s.v_cap * dev::bits_float((254 - exponent) << 23);
    s.v_cap = dev::bits_float(exponent << 23);
  }
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      float top = largest[nt][u];
      SAW_INT4_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) top = dev::fmax(top, dev::shfl_xor(top, mask));
      top = dev::fmax(top, s.m[nt][u]);
      const float keep = piece_weight(s.m[nt][u], top);
      s.m[nt][u] = top;
      s.l[nt][u] *= keep;
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) s.extra[group][nt][u] *= keep;
      SAW_INT4_UNROLL
      for (int i = 0; i < 4 * s.kWordGroups; ++i) {
        s.o[nt][i][u] *= keep * v_keep;
        s.o[nt][i][u + 2] *= keep * v_keep;
      }
    }
  }
}

// What hides tokens from query rows: rows[n] = {end, begin, tree bits low, high} in shared memory.
struct Masks {
  uint32_t rows;
  int tree_base;  // first new token when there is a tree mask, else past every token
};

SAW_INT4_DEVICE bool visible(int token, const uint4& row, int tree_base) {
  if (token >= static_cast<int>(row.x) || token < static_cast<int>(row.y)) return false;
  if (token < tree_base) return true;
  const int bit = token - tree_base;
  return ((bit < 32 ? row.z >> bit : row.w >> (bit - 32)) & 1u) != 0;
}

// Weights of 16 tokens: w[0] (logits) -> w[group] = p * scale in units of v_unit. kMasked: logits of -inf weigh
// nothing, even when the token's parameters are NaN.
template <bool kMasked, int D, int NT, int kGroups>
SAW_INT4_DEVICE void weigh(Softmax<D, NT, kGroups>& s, float (&w)[kGroups][NT][4], const float (&v_weight)[kGroups][2],
                           const float (&v_extra)[kGroups][2]) {
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int u = e % 2, half = e / 2;
      if (kMasked && w[0][nt][e] == -INFINITY) {
        SAW_INT4_UNROLL
        for (int group = 0; group < kGroups; ++group) w[group][nt][e] = 0.f;
        continue;
      }
      const float weight = dev::exp2_approx(w[0][nt][e] - s.m[nt][u]);
      s.l[nt][u] += weight;
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        s.extra[group][nt][u] = dev::fma_rn(weight, v_extra[group][half], s.extra[group][nt][u]);
        w[group][nt][e] = weight * v_weight[group][half];
      }
    }
  }
}

// The parameters of a row's groups, scale in the low half; row_params: their shared address.
template <int kGroups>
SAW_INT4_DEVICE void load_params(uint32_t row_params, uint32_t (&params)[kGroups]) {
  if constexpr (kGroups == 1) {
    params[0] = dev::ld_shared<uint32_t>(row_params);
  } else {
    const auto both = dev::ld_shared<uint2>(row_params);
    params[0] = both.x;
    params[1] = both.y;
  }
}

// MT * 16 tokens of one KV head; k_row, v_row: shared addresses of the first token's row, `stride` bytes apart.
template <int MT, int D, int NT, int kGroups>
SAW_INT4_DEVICE void attend(Softmax<D, NT, kGroups>& s, const Query<D, NT, kGroups>& query, uint32_t k_row,
                            uint32_t v_row, int stride, int token, bool masked, const Masks& masks, float logit_cap) {
  constexpr int kRowWords = D / kCodesPerWord;
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4;

  float w[MT][kGroups][NT][4];
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      SAW_INT4_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        SAW_INT4_UNROLL
        for (int e = 0; e < 4; ++e) w[mt][group][nt][e] = 0.f;
      }
    }
  }
  SAW_INT4_UNROLL
  for (int j = 0; j < query_words_per_lane(D); ++j) {
    // Past the row's last word the query is zero; any word will do.
    const int word = 4 * j + 4 <= kRowWords || 4 * j + c < kRowWords ? 4 * j + c : kRowWords - 1;
    uint32_t low[MT][4], high[MT][4];
    SAW_INT4_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      const uint32_t at = k_row + (16 * mt + g) * stride + 4 * word;
      biased_codes(dev::ld_shared<uint32_t>(at), low[mt]);
      biased_codes(dev::ld_shared<uint32_t>(at + 8 * stride), high[mt]);
    }
    SAW_INT4_UNROLL
    for (int nt = 0; nt < NT; ++nt) {
      const uint4 q = query.fragment(nt, j);
      SAW_INT4_UNROLL
      for (int mt = 0; mt < MT; ++mt) {
        // Channels 0 .. 3 of the word, then 4 .. 7.
        dev::mma_m16n8k16_f16(w[mt][0][nt], {low[mt][0], high[mt][0], low[mt][1], high[mt][1]}, {q.x, q.y});
        dev::mma_m16n8k16_f16(w[mt][kGroups - 1][nt], {low[mt][2], high[mt][2], low[mt][3], high[mt][3]}, {q.z, q.w});
      }
    }
  }

  float largest[NT][2], v_scale = 0.f, v_weight[MT][kGroups][2], v_extra[MT][kGroups][2];
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) largest[nt][0] = largest[nt][1] = -INFINITY;
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = (16 * mt + 8 * half + g) * stride + scale_byte(D, 0);
      uint32_t k_params[kGroups], v_params[kGroups];
      load_params(k_row + row, k_params);
      load_params(v_row + row, v_params);
      float scale[kGroups], offset[kGroups];
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        scale[group] = dev::f16_to_float(static_cast<uint16_t>(k_params[group]));
        offset[group] = dev::f16_to_float(static_cast<uint16_t>(k_params[group] >> 16));
      }
      SAW_INT4_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        SAW_INT4_UNROLL
        for (int u = 0; u < 2; ++u) {
          const ScoreTerms<kGroups> t = query.terms(nt, u);
          float logit = t.c0;
          SAW_INT4_UNROLL
          for (int group = 0; group < kGroups; ++group) {
            const float x = w[mt][group][nt][2 * half + u];
            logit = dev::fma_rn(scale[group], dev::fma_rn(x, t.k, -t.bias[group]),
                                dev::fma_rn(offset[group], t.qsum[group], logit));
          }
          w[mt][0][nt][2 * half + u] = logit;
        }
      }
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        float& weight = v_weight[mt][group][half];
        weight = dev::f16_to_float(static_cast<uint16_t>(v_params[group]));
        v_extra[mt][group][half] =
            dev::fma_rn(kCodeCentre, weight, dev::f16_to_float(static_cast<uint16_t>(v_params[group] >> 16)));
        v_scale = dev::fmax(v_scale, weight);
      }
    }
  }
  if (logit_cap > 0.f) {
    // cap * tanh(x / cap), tanh(y) = 1 - 2 / (e^2y + 1); exact to fp32's last bits of cap, which is all a logit needs.
    const float cap = logit_cap * kLog2e, inverse = dev::div_rn(2.f * kLog2e, cap);
    SAW_INT4_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      SAW_INT4_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        SAW_INT4_UNROLL
        for (int e = 0; e < 4; ++e) {
          float& logit = w[mt][0][nt][e];
          const float power = dev::exp2_approx(logit * inverse);
          logit = dev::fma_rn(-2.f * cap, dev::rcp_approx(power + 1.f), cap);
        }
      }
    }
  }
  if (masked) {
    SAW_INT4_UNROLL
    for (int nt = 0; nt < NT; ++nt) {
      SAW_INT4_UNROLL
      for (int u = 0; u < 2; ++u) {
        const auto row = dev::ld_shared<uint4>(masks.rows + (nt * kRowsPerTile + 2 * c + u) * 16);
        SAW_INT4_UNROLL
        for (int mt = 0; mt < MT; ++mt) {
          SAW_INT4_UNROLL
          for (int half = 0; half < 2; ++half) {
            if (!visible(token + 16 * mt + 8 * half + g, row, masks.tree_base)) w[mt][0][nt][2 * half + u] = -INFINITY;
          }
        }
      }
    }
  }
  bool moves = v_scale >= s.v_cap && v_scale > 0.f;
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      SAW_INT4_UNROLL
      for (int mt = 0; mt < MT; ++mt)
        largest[nt][u] = dev::fmax(largest[nt][u], dev::fmax(w[mt][0][nt][u], w[mt][0][nt][u + 2]));
      moves = moves | (largest[nt][u] > s.m[nt][u] + kSlack);
    }
  }
  if (dev::any(moves)) rescale(s, largest, v_scale);

  const float v_unit = s.v_unit();
  uint32_t p[MT][kGroups][NT][2];
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      SAW_INT4_UNROLL
      for (int half = 0; half < 2; ++half) v_weight[mt][group][half] *= v_unit;
    }
    if (masked)
      weigh<true>(s, w[mt], v_weight[mt], v_extra[mt]);
    else
      weigh<false>(s, w[mt], v_weight[mt], v_extra[mt]);
    SAW_INT4_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      SAW_INT4_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        const auto& x = w[mt][group][nt];
        p[mt][group][nt][0] = dev::movmatrix_trans_b16(dev::pack_f16x2(x[0], x[1]));
        p[mt][group][nt][1] = dev::movmatrix_trans_b16(dev::pack_f16x2(x[2], x[3]));
      }
    }
  }

  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int wg = 0; wg < s.kWordGroups; ++wg) {
      const int word = 8 * wg + 8 <= kRowWords || 8 * wg + g < kRowWords ? 8 * wg + g : kRowWords - 1;
      const uint32_t at = v_row + (16 * mt + 2 * c) * stride + 4 * word;
      const auto t0 = dev::ld_shared<uint32_t>(at), t1 = dev::ld_shared<uint32_t>(at + stride);
      const auto t8 = dev::ld_shared<uint32_t>(at + 8 * stride), t9 = dev::ld_shared<uint32_t>(at + 9 * stride);
      uint32_t even01[4], odd01[4], even89[4], odd89[4];  // channels 2i, 2i + 1 of the word, tokens as named
      centred_codes(dev::prmt(t0, t1, 0x5410), even01);
      centred_codes(dev::prmt(t0, t1, 0x7632), odd01);
      centred_codes(dev::prmt(t8, t9, 0x5410), even89);
      centred_codes(dev::prmt(t8, t9, 0x7632), odd89);
      SAW_INT4_UNROLL
      for (int i = 0; i < 4; ++i) {
        SAW_INT4_UNROLL
        for (int nt = 0; nt < NT; ++nt)
          dev::mma_m16n8k16_f16(s.o[nt][4 * wg + i], {even01[i], odd01[i], even89[i], odd89[i]},
                                p[mt][group_of_channel(2 * i, kGroups)][nt]);
      }
    }
  }
}

// The tiles of `piece`, pipelined; leaves the block's softmax state in registers and no copy in flight. meanwhile():
// for one thread, while the slots are on their way.
template <int D, int NT, int kGroups, typename Meanwhile>
SAW_INT4_DEVICE void run_tiles(Softmax<D, NT, kGroups>& s, const DecodeParams& p, const DecodePlan& plan,
                               const Piece& piece, const Meanwhile& meanwhile) {
  const uint32_t base = dev::shared_base();
  const int thread = dev::thread_index(), stages = plan.stages, stage_tokens = plan.stage_tokens;
  constexpr int kRowBytes = row_bytes(D, kGroups);
  const int token_bytes = p.num_kv_heads * kRowBytes;
  const int block_head_bytes = piece.kv_head * kRowBytes;
  const int inside_chunk = block_head_bytes % plan.chunk_bytes;
  const TileSource source{p.slot_table + piece.table_row * p.table_stride, block_head_bytes - inside_chunk, token_bytes,
                          piece.seq_len};
  const uint32_t slots = base + plan.slots_offset;
  const bool has_slot = thread < stage_tokens;
  const auto first_token = [&](int i) { return piece.tile_begin * plan.tile_tokens + i * stage_tokens; };  // of stage i
  constexpr int kTiles = tiles_per_stage(NT);
  const int tiles = piece.tile_end - piece.tile_begin, used_stages = (tiles + kTiles - 1) / kTiles;
  const int half_stage = tiles % kTiles != 0 ? used_stages - 1 : -1;  // that has one tile only
  const auto tokens_in = [&](int i) { return kTiles > 1 && i == half_stage ? plan.tile_tokens : stage_tokens; };

  // Slots of the first `stages` stages and query rows, in one trip to memory; then the copies of all stages but the
  // last.
  int first_slots[kMaxStages];
  SAW_INT4_UNROLL
  for (int i = 0; i < kMaxStages; ++i)
    first_slots[i] = has_slot && i < stages ? fetch_slot(source, first_token(i) + thread) : kPastEnd;
  int next_slot = has_slot ? fetch_slot(source, first_token(stages) + thread) : kPastEnd;
  const QueryTurns<D, NT> turns{plan.heads_shift, piece.rows.rows};
  RawQuery<D> raw_query = fetch_query(p, piece.rows, piece.kv_head, turns, 0);
  if (thread == dev::thread_count() - 1) meanwhile();
  // What each query row sees. Rows of a pass: 0 .. rows - 1; the padding sees nothing.
  const int first_new = piece.seq_len - piece.q_len;
  const int first_position = first_new + piece.rows.token(0);
  const int last_position = first_new + piece.rows.token(piece.rows.rows - 1);
  const Masks masks{base + plan.rows_offset, p.tree_mask == nullptr ? 0x7fffffff : first_new};
  if (thread < kRowsPerTile * NT) {
    uint4 row{0, 0, 0, 0};
    if (thread < piece.rows.rows) {
      const int token = piece.rows.token(thread), position = first_new + token;
      const bool tree = p.tree_mask != nullptr;
      const int end = tree && p.window < 0 ? piece.seq_len : position + 1;
      row.x = static_cast<uint32_t>(end);
      row.y = static_cast<uint32_t>(p.window >= 0 && position > p.window ? position - static_cast<int>(p.window) : 0);
      if (tree) {
        const auto bits = static_cast<uint64_t>(dev::ld_global(p.tree_mask + piece.rows.first_token + token));
        row.z = static_cast<uint32_t>(bits);
        row.w = static_cast<uint32_t>(bits >> 32);
      }
    }
    dev::st_shared(masks.rows + thread * 16, row);
  }
  const int unmasked_end = p.tree_mask == nullptr ? first_position + 1 : first_new;
  const int unmasked_begin = p.window >= 0 && last_position > p.window ? last_position - static_cast<int>(p.window) : 0;

  SAW_INT4_UNROLL
  for (int i = 0; i < kMaxStages; ++i)
    if (has_slot && i < stages)
      dev::st_shared<int32_t>(slots + (i * stage_tokens + thread) * 4, checked_slot(first_slots[i], p.num_slots));
  dev::block_sync();
  SAW_INT4_UNROLL_BY(1)
  for (int i = 0; i < stages - 1; ++i) {
    if (i < used_stages)
      copy_stage<4>(p, plan, source, tokens_in(i), slots + i * stage_tokens * 4, base + i * plan.stage_bytes);
    dev::cp_async_commit();
  }

  SAW_INT4_UNROLL_BY(1)
  for (int turn = 0; turns.has(turn); ++turn) {
    const RawQuery<D> raw = raw_query;
    raw_query = fetch_query(p, piece.rows, piece.kv_head, turns, turn + 1);
    transform_query<kGroups>(p, piece.kv_head, turns, turn, raw, base + plan.query_offset);
  }
  dev::block_sync();
  const int head = dev::warp_id() / plan.ways, way = dev::warp_id() % plan.ways;
  const uint32_t head_rows = base + inside_chunk + head * kRowBytes;
  Query<D, NT, kGroups> query;
  query.shared = base + plan.query_offset + head * query_bytes(D, NT, kGroups);
  query.load();

  int stage = 0;
  for (int i = 0; i < used_stages; ++i) {
    wait_oldest(stages);
    dev::block_sync();
    const int before = stage == 0 ? stages - 1 : stage - 1;  // the stage that everybody has left
    const int ahead = i + stages - 1;
    if (ahead < used_stages)
      copy_stage<4>(p, plan, source, tokens_in(ahead), slots + before * stage_tokens * 4,
                    base + before * plan.stage_bytes);
    dev::cp_async_commit();
    if (has_slot) {
      dev::st_shared<int32_t>(slots + (stage * stage_tokens + thread) * 4, checked_slot(next_slot, p.num_slots));
      next_slot = fetch_slot(source, first_token(ahead + 2) + thread);
    }
    const bool half = kTiles > 1 && i == half_stage;
    const int mine = half ? kTokensPerWarp / kTiles : kTokensPerWarp;
    const int token = first_token(i) + way * mine;
    const bool masked = token + mine > unmasked_end || token < unmasked_begin;
    const uint32_t k_row = head_rows + stage * plan.stage_bytes + way * mine * plan.token_stride;
    const uint32_t v_row = k_row + plan.stage_bytes / 2;
    constexpr int kMT = token_tiles(D, NT, kGroups, dev::kMeasuredArch);
    if (half) {
      attend<1>(s, query, k_row, v_row, plan.token_stride, token, masked, masks, p.logit_cap);
    } else {
      for (int t = 0; t < kTokensPerWarp; t += 16 * kMT)
        attend<kMT>(s, query, k_row + t * plan.token_stride, v_row + t * plan.token_stride, plan.token_stride,
                    token + t, masked, masks, p.logit_cap);
    }
    if (++stage == stages) stage = 0;
  }
  dev::cp_async_wait<0>();
}

// Rows of a piece in the order in which they are stored: those of all the block's heads, heads fastest.
template <int D>
SAW_INT4_DEVICE void finish_row(const DecodeParams& p, const DecodePlan& plan, const Piece& piece, RowPiece<D>& sum,
                                int index) {
  const int head = index & (plan.heads_per_block - 1), row = index >> plan.heads_shift;
  write_row<D>(p, sum, piece.rows.first_token + piece.rows.token(row),
               (piece.kv_head + head) * piece.rows.group + piece.rows.head(row));
}

// Where piece i of the run lies in the workspace.
SAW_INT4_DEVICE uint8_t* piece_memory(const DecodeParams& p, const DecodePlan& plan, const Share& share, int i) {
  return static_cast<uint8_t*>(p.workspace) + share.slot(i) * plan.piece_floats * 4;
}

// The softmax states of the block's warps to finished rows, or to the block's slot of the workspace.
template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void write_piece(Softmax<D, NT, kGroups>& s, const DecodeParams& p, const DecodePlan& plan,
                                 const Piece& piece, const Share& share) {
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4;
  const uint32_t records = dev::shared_base(), mine = records + dev::warp_id() * kRowsPerTile * Record<D>::kBytes;
  const float unit = s.v_cap * (1.f / (1 << kWeightBits));
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    const int left = piece.rows.rows - nt * kRowsPerTile, used = left < kRowsPerTile ? left : kRowsPerTile;
    dev::block_sync();  // the stages, or the row tile before, are no longer read
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      float l = s.l[nt][u], extra[kGroups];
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) extra[group] = s.extra[group][nt][u];
      SAW_INT4_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        l += dev::shfl_xor(l, mask);
        SAW_INT4_UNROLL
        for (int group = 0; group < kGroups; ++group) extra[group] += dev::shfl_xor(extra[group], mask);
      }
      if (2 * c + u >= used) continue;
      const uint32_t record = mine + (2 * c + u) * Record<D>::kBytes;
      if (g == 0) dev::st_shared(record + Record<D>::kSumsAt, float2{s.m[nt][u], l});
      SAW_INT4_UNROLL
      for (int wg = 0; wg < s.kWordGroups; ++wg) {
        const int word = 8 * wg + g;
        if (word >= D / kCodesPerWord) continue;
        float x[kCodesPerWord];
        SAW_INT4_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float centre = extra[group_of_channel(2 * i, kGroups)];
          x[2 * i] = dev::fma_rn(s.o[nt][4 * wg + i][u], unit, centre);
          x[2 * i + 1] = dev::fma_rn(s.o[nt][4 * wg + i][u + 2], unit, centre);
        }
        // Lanes with odd g store their halves in the other order: neighbours meet in no bank.
        const bool swap = g % 2 != 0;
        SAW_INT4_UNROLL
        for (int half = 0; half < 2; ++half) {
          float4 v;
          v.x = (half != 0) != swap ? x[4] : x[0];
          v.y = (half != 0) != swap ? x[5] : x[1];
          v.z = (half != 0) != swap ? x[6] : x[2];
          v.w = (half != 0) != swap ? x[7] : x[3];
          dev::st_shared(record + word * kCodesPerWord * 4 + 16 * (swap ? 1 - half : half), v);
        }
      }
    }
    dev::block_sync();
    for (int i = dev::warp_id(); i < used << plan.heads_shift; i += plan.warps) {
      const int head = i & (plan.heads_per_block - 1), row = i >> plan.heads_shift;
      const int index = i + (nt * kRowsPerTile << plan.heads_shift);
      RowPiece<D> sum = sum_shared_records<D>(records + (head * plan.ways * kRowsPerTile + row) * Record<D>::kBytes,
                                              kRowsPerTile * Record<D>::kBytes, plan.ways);
      if (share.pieces == 1) {
        finish_row<D>(p, plan, piece, sum, index);
      } else {
        uint8_t* to = piece_memory(p, plan, share, share.index) + index * Record<D>::kBytes;
        store_record(sum, [&](int at, const float4& x) { dev::st_global(reinterpret_cast<float4*>(to + at), x); });
      }
    }
  }
}

// Adds up the pieces of a run and writes its rows. Where there are fewer rows than warps, several warps share a row:
// each adds every ways-th piece, the first of them what they found.
template <int D>
SAW_INT4_DEVICE void merge_run(const DecodeParams& p, const DecodePlan& plan, const Piece& piece, const Share& share) {
  const int rows = piece.rows.rows << plan.heads_shift, pieces = share.pieces;
  int shift = 0;  // logarithm of the warps that share a row
  while (rows << (shift + 1) <= plan.warps && pieces > 1 << shift) ++shift;
  const int ways = 1 << shift, way = dev::warp_id() & (ways - 1), mine = (pieces - way + ways - 1) >> shift;
  const uint32_t record = dev::shared_base() + dev::warp_id() * Record<D>::kBytes;
  const int64_t step = (plan.piece_floats * 4 * share.slot_step)
                       << shift;  // bytes between pieces of a warp, but the run's 0
  SAW_INT4_UNROLL_BY(1)
  for (int row = dev::warp_id() >> shift; row < rows; row += plan.warps >> shift) {
    const uint8_t* first = piece_memory(p, plan, share, way) + row * Record<D>::kBytes;
    const uint8_t* others = piece_memory(p, plan, share, way + ways) + row * Record<D>::kBytes - step;
    const auto at = [&](int i) { return i == 0 ? first : others + i * step; };
    RowPiece<D> sum = sum_records<D>(
        mine,
        [&](int i) { return dev::ld_global_coherent(reinterpret_cast<const float2*>(at(i) + Record<D>::kSumsAt)); },
        [&](int i, int e) {
          return dev::ld_global_coherent(reinterpret_cast<const float4*>(at(i) + Record<D>::at() + 4 * e));
        });
    if (ways == 1)
      finish_row<D>(p, plan, piece, sum, row);
    else
      store_record(sum, [&](int byte, const float4& x) { dev::st_shared(record + byte, x); });
  }
  if (ways == 1) return;
  dev::block_sync();
  const int row = dev::warp_id() >> shift;
  if (way != 0 || row >= rows) return;
  RowPiece<D> sum = sum_shared_records<D>(record, Record<D>::kBytes, ways);
  finish_row<D>(p, plan, piece, sum, row);
}

// Counts the pieces of a run: the counter of its first query row and head.
SAW_INT4_DEVICE uint32_t* run_counter(const DecodeParams& p, const Piece& piece) {
  const int64_t first_row = static_cast<int64_t>(piece.rows.first_token + piece.rows.token(0)) * p.num_q_heads +
                            piece.kv_head * piece.rows.group + piece.rows.head(0);
  return reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.workspace) + p.workspace_bytes) - 1 - first_row;
}

// Counts a piece of a run; true for the last.
SAW_INT4_DEVICE bool arrives_last(uint32_t* counter, int pieces, uint32_t scratch) {
  dev::block_sync();
  if (dev::thread_index() == 0) {
    dev::thread_fence();
    const auto before = static_cast<int32_t>(dev::atomic_add_u32(counter, 1));
    if (before + 1 == pieces) {
      dev::thread_fence();
      dev::st_global(counter, 0u);  // for the next launch
    }
    dev::st_shared(scratch, before);
  }
  dev::block_sync();
  return dev::ld_shared<int32_t>(scratch) + 1 == pieces;
}

template <int D, int NT, int kGroups>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(32 * kMaxWarps,
                                       NT == 1 || dev::kMeasuredArch ? blocks_by_registers(D, NT, kGroups) : 1)
    saw_int4_decode_kernel(const DecodeParams p, const DecodePlan plan) {
  const uint32_t scratch = dev::shared_base() + plan.scratch_offset;
  const Cursor<NT> cursor(scratch);
  Piece piece = cursor.start(p, plan);
  while (piece.exists()) {
    Softmax<D, NT, kGroups> state;
    reset(state);
    run_tiles(state, p, plan, piece, [&] {
      const Share share = cursor.share(plan, piece);
      cursor.keep_share(share);
      if (share.pieces > 1) dev::prefetch_l2(run_counter(p, piece));
    });
    const Share share = cursor.kept_share();
    write_piece(state, p, plan, piece, share);
    if (share.pieces > 1 && arrives_last(run_counter(p, piece), share.pieces, scratch + cursor.kFreeAt))
      merge_run<D>(p, plan, piece, share);
    piece = cursor.next(p, plan);
  }
}

}  // namespace saw_int4
