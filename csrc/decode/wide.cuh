// A pass of up to 32 query rows. Four warps share tokens of one KV head. First each has its own tokens' scores
// and weights, then, with the weights of all in shared memory, its own quarter of the channels over all tokens: K and V
// are each unpacked once, and for 32 rows and head_dim 128 a lane keeps 32 sums of O instead of 128, so that 16 warps
// fit on an SM. lane = 4g + c; a warp holds, for QK, tokens g and g + 8, words 4j + c; for PV, tokens 2c, 2c+1, 2c+8,
// 2c+9 and one word (ChannelMap). B operands, q' and P, stay in shared memory (shared_mma).
//
// The four warps agree on the rows' reference logits: a vote says whether any moves.
//
// Bound: issue slots and latencies, no longer HBM (csrc/README.md).
#pragma once

#include "decode/merge.cuh"
#include "decode/softmax.cuh"

namespace saw_int4 {

// Which channels the four warps have: row g of MMA i of PV is channels 2*pair, 2*pair + 1 (rows g + 8) of the word,
// pair = 2*byte + nibble as they lie in each half of it. Lanes g and g + 4 share a word. Of two groups, an MMA sees
// one, the same in all four warps, as their weights, its B, are: head_dim 64 has too few MMAs for that.
template <int D, int kGroups>
struct ChannelMap {
  static_assert(D == 128 || (D == 64 && kGroups == 1));
  static constexpr int kTiles = D / 64;  // MMAs of 16 channels
  int way, sub, word;                    // sub: which of the lanes that share the word

  SAW_INT4_DEVICE ChannelMap(int way_of_four, int g)
      : way(way_of_four), sub(g / 4), word(4 * (D == 128 ? way : way % 2) + g % 4) {}
  SAW_INT4_DEVICE int byte(int i) const { return D == 64 ? way / 2 : kGroups == 1 ? sub : i; }
  SAW_INT4_DEVICE int nibble(int i) const { return D == 64 || kGroups > 1 ? sub : i; }
  SAW_INT4_DEVICE int pair(int i) const { return 2 * byte(i) + nibble(i); }
  SAW_INT4_DEVICE int group(int i) const { return kGroups == 1 ? 0 : i; }
};

// Running softmax of the rows of a head: lane 4g + c, rows 8*nt + 2c + u. l and extra are this lane's share (its own
// tokens only), o all tokens' of the warp's channels, in units of v_cap * 2^-kWeightBits times (code - 8).
template <int D, int NT, int kGroups>
struct WideState {
  float l[NT][2] = {}, extra[kGroups][NT][2] = {};
  float o[D / 64][NT][4] = {};
  float v_cap = 0.f;                    // the same in all four warps
  uint32_t unseen = (1 << 2 * NT) - 1;  // bit 2*nt + u: no token of the row yet; its reference is 0
};

// One of four warps: which, and where they meet in shared memory. The same in all lanes, and for the compiler, too.
struct WideWarp {
  int way;
  uint32_t query, weights, references;  // of the head; of the four, and a float for each row

  SAW_INT4_DEVICE uint32_t reference_at(int row) const { return references + 4 * row; }
};

// Runs of the weights: token t of the four is run t % 8 of matrix t / 8 along K.
template <int NT>
SAW_INT4_DEVICE uint32_t weights_at(int eight_tokens) {
  return eight_tokens * (NT * 128);
}

// Scores of the warp's tokens, of its first row on, up to the row's factor k and the key's scale, in units of 2^-24:
// w[mt][group].
template <int MT, int D, int NT, int kGroups, typename Copy>
SAW_INT4_DEVICE void multiply_keys(float (&w)[MT][kGroups][NT][4], uint32_t query, uint32_t k_row, int stride,
                                   const Copy& copy) {
  using Layout = QueryLayout<D, NT, kGroups>;
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4;
  constexpr int kWordsOfToken = D / 32, kSteps = MT * kWordsOfToken;
  constexpr int kTurns = wide_copy_turns(D, kGroups);
  static_assert(kTurns <= kSteps);
  const uint32_t first = k_row + g * stride + 4 * c;
  uint32_t words[2][2];  // of a step and of the next: tokens g and g + 8
  const auto load = [&](int step) {
    const uint32_t at = first + 16 * (step / kWordsOfToken) * stride + 16 * (step % kWordsOfToken);
    words[step % 2][0] = dev::ld_shared<uint32_t>(at);
    words[step % 2][1] = dev::ld_shared<uint32_t>(at + 8 * stride);
  };
  load(0);
  uint32_t a[2][2][4];  // two words' operands: one is unpacked while the other is multiplied
  int turn = 0;
  SAW_INT4_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int mt = step / kWordsOfToken, j = step % kWordsOfToken;
    if (step + 1 < kSteps) load(step + 1);
    uint32_t low[4], high[4];
    code_pairs(words[step % 2][0], low);
    code_pairs(words[step % 2][1], high);
    auto& mine = a[step % 2];
    SAW_INT4_UNROLL
    for (int i = 0; i < 2; ++i) {
      mine[i][0] = low[2 * i];
      mine[i][1] = high[2 * i];
      mine[i][2] = low[2 * i + 1];
      mine[i][3] = high[2 * i + 1];
    }
    dev::shared_mma_begin(mine);
    // Channels 0 .. 3 of the word, then 4 .. 7.
    SAW_INT4_UNROLL
    for (int half = 0; half < 2; ++half) {
      auto& sums = w[mt][half * (kGroups - 1)];
      const auto b = dev::shared_operand(query, Layout::pair_at(0, 4 * j, 2 * half));
      if (j == 0 && half < kGroups)
        dev::shared_mma_first<false>(sums, mine[half], b);
      else
        dev::shared_mma<false>(sums, mine[half], b);
    }
    dev::shared_mma_commit();
    // At every other step, and the last ones.
    if (turn < kTurns && (step == 2 * turn || step == kSteps - kTurns + turn)) copy.turn(turn++);
    if (step > 0) dev::shared_mma_wait<1>(a[(step - 1) % 2]);
  }
  dev::shared_mma_wait<0>(a[(kSteps - 1) % 2]);
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int group = 0; group < kGroups; ++group) dev::shared_mma_end(w[mt][group]);
  }
}

// Moves the references of the rows, and v_cap, to what the four warps have seen; w: logits less references. Rare after
// the first tiles.
template <int MT, int D, int NT, int kGroups>
SAW_INT4_DEVICE void agree(WideState<D, NT, kGroups>& s, float (&w)[MT][kGroups][NT][4], const WideWarp& four,
                           float v_scale) {
  using Layout = QueryLayout<D, NT, kGroups>;
  constexpr int kRows = NT * kRowsPerTile, kBytes = (kRows + 4) * 4;  // of a warp
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4, way = four.way;
  SAW_INT4_UNROLL
  for (int mask = 4; mask < 32; mask *= 2) v_scale = dev::fmax(v_scale, dev::shfl_xor(v_scale, mask));
  // No weights are there yet.
  if (dev::lane_id() == 0) dev::st_shared(four.weights + way * kBytes + kRows * 4, v_scale);
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      float top = -INFINITY;
      SAW_INT4_UNROLL
      for (int mt = 0; mt < MT; ++mt) top = dev::fmax(top, dev::fmax(w[mt][0][nt][u], w[mt][0][nt][u + 2]));
      SAW_INT4_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) top = dev::fmax(top, dev::shfl_xor(top, mask));
      // "g == 0" costs this kernel a register more.
      if (g < 1) dev::st_shared(four.weights + way * kBytes + (nt * kRowsPerTile + 2 * c + u) * 4, top);
    }
  }
  dev::four_warps_sync();
  SAW_INT4_UNROLL
  for (int other = 0; other < kWideWays; ++other)
    v_scale = dev::fmax(v_scale, dev::ld_shared<float>(four.weights + other * kBytes + kRows * 4));
  const float v_keep = raise_cap(s.v_cap, v_scale);
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      const int row = nt * kRowsPerTile + 2 * c + u;
      float top = -INFINITY;
      SAW_INT4_UNROLL
      for (int other = 0; other < kWideWays; ++other)
        top = dev::fmax(top, dev::ld_shared<float>(four.weights + other * kBytes + row * 4));
      const bool unseen = (s.unseen >> (2 * nt + u) & 1u) != 0;
      const float up = top > 0.f || (unseen && top > -INFINITY) ? top : 0.f;
      const float keep = unseen ? 1.f : dev::exp2_approx(-up);  // sums of unseen rows are 0
      if (top > -INFINITY) s.unseen &= ~(1u << (2 * nt + u));
      if (way == 0 && g == 0) {
        const uint32_t reference = four.reference_at(row);
        dev::st_shared(reference, dev::ld_shared<float>(reference) + up);
      }
      s.l[nt][u] *= keep;
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) s.extra[group][nt][u] *= keep;
      SAW_INT4_UNROLL
      for (int i = 0; i < D / 64; ++i) {
        s.o[i][nt][u] *= keep * v_keep;
        s.o[i][nt][u + 2] *= keep * v_keep;
      }
      SAW_INT4_UNROLL
      for (int mt = 0; mt < MT; ++mt) {
        w[mt][0][nt][u] -= up;
        w[mt][0][nt][u + 2] -= up;
      }
    }
  }
  dev::four_warps_sync();  // the place is free for weights
}

// Weights of the warp's tokens, w[0] (logits less references) -> shared memory, p * scale in units of v_unit. kMasked:
// logits of -inf weigh nothing, even when the token's parameters are NaN.
template <bool kMasked, int MT, int D, int NT, int kGroups>
SAW_INT4_DEVICE void weigh(WideState<D, NT, kGroups>& s, float (&w)[MT][kGroups][NT][4],
                           const float (&v_weight)[MT][kGroups][2], const float (&v_extra)[MT][kGroups][2],
                           uint32_t weights) {
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    uint32_t pairs[2][kGroups][NT];
    SAW_INT4_UNROLL
    for (int nt = 0; nt < NT; ++nt) {
      SAW_INT4_UNROLL
      for (int half = 0; half < 2; ++half) {
        float x[kGroups][2];
        SAW_INT4_UNROLL
        for (int u = 0; u < 2; ++u) {
          const float logit = w[mt][0][nt][2 * half + u];
          const bool hidden = kMasked && logit == -INFINITY;
          const float weight = dev::exp2_approx(logit);
          s.l[nt][u] += weight;
          SAW_INT4_UNROLL
          for (int group = 0; group < kGroups; ++group) {
            float& extra = s.extra[group][nt][u];
            extra = hidden ? extra : dev::fma_rn(weight, v_extra[mt][group][half], extra);
            x[group][u] = hidden ? 0.f : weight * v_weight[mt][group][half];
          }
        }
        SAW_INT4_UNROLL
        for (int group = 0; group < kGroups; ++group)
          pairs[half][group][nt] = dev::pack_f16x2(x[group][0], x[group][1]);
      }
    }
    SAW_INT4_UNROLL
    for (int half = 0; half < 2; ++half) {
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group)
        dev::st_matrices(weights + weights_at<NT>(2 * mt + half + group * kWideWays * 2 * MT), pairs[half][group]);
    }
  }
}

// O of the warp's channels over all tokens of the four; v_rows: shared address of the first token's row.
template <int MT, int D, int NT, int kGroups>
SAW_INT4_DEVICE void multiply_values(WideState<D, NT, kGroups>& s, const WideWarp& four, uint32_t v_rows, int stride) {
  using Map = ChannelMap<D, kGroups>;
  constexpr int kTiles = Map::kTiles, kSteps = kWideWays * MT;
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4;
  const Map map(four.way, g);
  const uint32_t first = v_rows + 2 * c * stride + 4 * map.word;
  uint32_t words[2][4];  // of a step and of the next: tokens 2c, 2c+1, 2c+8, 2c+9
  const auto load = [&](int step) {
    const uint32_t at = first + 16 * step * stride;
    SAW_INT4_UNROLL
    for (int i = 0; i < 4; ++i) words[step % 2][i] = dev::ld_shared<uint32_t>(at + (8 * (i / 2) + i % 2) * stride);
  };
  load(0);
  uint32_t a[2][kTiles][4];
  SAW_INT4_UNROLL
  for (int i = 0; i < kTiles; ++i) dev::shared_mma_start(s.o[i]);
  SAW_INT4_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) load(step + 1);
    const auto& t = words[step % 2];
    auto& mine = a[step % 2];
    SAW_INT4_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t even = 0x4400 + 0x1111 * map.byte(i), odd = even + 0x2222;
      SAW_INT4_UNROLL
      for (int r = 0; r < 4; ++r) {
        const uint32_t pair = dev::prmt(t[r / 2 * 2], t[r / 2 * 2 + 1], r % 2 == 0 ? even : odd);
        mine[i][r] = centred_pair(pair, map.nibble(i));
      }
    }
    if (step == 0) dev::four_warps_sync();  // the weights are there
    dev::shared_mma_begin(mine);
    SAW_INT4_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const auto b = dev::shared_operand(four.weights, weights_at<NT>(2 * step + 2 * kSteps * map.group(i)));
      dev::shared_mma<true>(s.o[i], mine[i], b);
    }
    dev::shared_mma_commit();
    if (step > 0) dev::shared_mma_wait<1>(a[(step - 1) % 2]);
  }
  dev::shared_mma_wait<0>(a[(kSteps - 1) % 2]);
  SAW_INT4_UNROLL
  for (int i = 0; i < kTiles; ++i) dev::shared_mma_end(s.o[i]);
}

// MT * 16 tokens of each of four warps; k_rows, v_rows: shared addresses of the first one's, `stride` bytes
// apart. token, masked: the warp's first, and whether any query row may not see some of its tokens.
template <int MT, int D, int NT, int kGroups, typename Copy>
SAW_INT4_DEVICE void attend_together(WideState<D, NT, kGroups>& s, const WideWarp& four, uint32_t k_rows,
                                     uint32_t v_rows, int stride, int token, bool masked, const Masks& masks,
                                     float logit_cap, const Copy& copy) {
  using Layout = QueryLayout<D, NT, kGroups>;
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4, way = four.way;
  const int mine = way * 16 * MT * stride;
  float w[MT][kGroups][NT][4];
  multiply_keys<MT, D, NT, kGroups>(w, four.query, k_rows + mine, stride, copy);

  float k_scale[MT][kGroups][2], k_offset[MT][kGroups][2];
  const auto params_at = [&](int mt, int half) { return mine + (16 * mt + 8 * half + g) * stride + scale_byte(D, 0); };
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t params[kGroups];
      load_params(k_rows + params_at(mt, half), params);
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        k_scale[mt][group][half] = kCodesPerUnit * param_scale(params[group]);
        k_offset[mt][group][half] = param_offset(params[group]);
      }
    }
  }
  // Logits less references.
  const auto terms_at = [&](int nt, int u) { return four.query + Layout::terms_at(nt * kRowsPerTile + 2 * c + u); };
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    const auto references = dev::ld_shared<float2>(four.reference_at(nt * kRowsPerTile + 2 * c));
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      const float reference = u == 0 ? references.x : references.y;
      const auto terms = dev::ld_shared<float4>(terms_at(nt, u));  // k, c0 / k, qsum
      float qsum[kGroups] = {terms.z};
      if constexpr (kGroups > 1) qsum[1] = terms.w;
      SAW_INT4_UNROLL
      for (int mt = 0; mt < MT; ++mt) {
        SAW_INT4_UNROLL
        for (int half = 0; half < 2; ++half) {
          float y = terms.y;
          SAW_INT4_UNROLL
          for (int group = 0; group < kGroups; ++group)
            y = dev::fma_rn(k_scale[mt][group][half], w[mt][group][nt][2 * half + u],
                            dev::fma_rn(k_offset[mt][group][half], qsum[group], y));
          w[mt][0][nt][2 * half + u] = dev::fma_rn(y, terms.x, -reference);
        }
      }
    }
  }
  if (logit_cap > 0.f) {
    const SoftCap soft_cap(logit_cap);
    SAW_INT4_UNROLL
    for (int nt = 0; nt < NT; ++nt) {
      SAW_INT4_UNROLL
      for (int u = 0; u < 2; ++u) {
        const auto reference = dev::ld_shared<float>(four.reference_at(nt * kRowsPerTile + 2 * c + u));
        SAW_INT4_UNROLL
        for (int mt = 0; mt < MT; ++mt) {
          SAW_INT4_UNROLL
          for (int half = 0; half < 2; ++half) {
            float& logit = w[mt][0][nt][2 * half + u];
            logit = soft_cap(logit + reference) - reference;
          }
        }
      }
    }
  }
  if (masked) hide(w, token, masks);
  // The largest, as integers: bits of floats order like them where it matters, above 0.
  int32_t highest = INT32_MIN;
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int nt = 0; nt < NT; ++nt) {
      SAW_INT4_UNROLL
      for (int e = 0; e < 4; e += 2)
        highest = dev::max3(highest, static_cast<int32_t>(dev::float_bits(w[mt][0][nt][e])),
                            static_cast<int32_t>(dev::float_bits(w[mt][0][nt][e + 1])));
    }
  }
  float v_scale = 0.f, v_weight[MT][kGroups][2], v_extra[MT][kGroups][2];
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t params[kGroups];
      load_params(v_rows + params_at(mt, half), params);
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        float& weight = v_weight[mt][group][half];
        weight = param_scale(params[group]);
        v_extra[mt][group][half] = dev::fma_rn(kCodeCentre, weight, param_offset(params[group]));
        v_scale = dev::fmax(v_scale, weight);
      }
    }
  }
  const bool moves =
      highest > static_cast<int32_t>(dev::float_bits(kSlack)) || s.unseen != 0 || (v_scale >= s.v_cap && v_scale > 0.f);
  if (dev::four_warps_any(moves)) agree(s, w, four, v_scale);

  const float unit = v_unit(s.v_cap);
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      SAW_INT4_UNROLL
      for (int half = 0; half < 2; ++half) v_weight[mt][group][half] *= unit;
    }
  }
  const uint32_t my_weights = four.weights + weights_at<NT>(way * 2 * MT);
  if (masked)
    weigh<true>(s, w, v_weight, v_extra, my_weights);
  else
    weigh<false>(s, w, v_weight, v_extra, my_weights);
  dev::publish_shared();
  multiply_values<MT>(s, four, v_rows, stride);
}

// The sums of the rows to records in shared memory: all rows of each four warps.
template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void store_records(const WideState<D, NT, kGroups>& s, const WideWarp& four, int used,
                                   uint32_t records) {
  using Layout = QueryLayout<D, NT, kGroups>;
  using Map = ChannelMap<D, kGroups>;
  constexpr int kRows = NT * kRowsPerTile, kSums = 1 + kGroups;
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4, way = four.way;
  const Map map(way, g);
  const auto sums_of = [&](int of_way, int row) { return four.weights + (of_way * kRows + row) * (kSums * 4); };
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      float sums[kSums] = {s.l[nt][u]};
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) sums[1 + group] = s.extra[group][nt][u];
      SAW_INT4_UNROLL
      for (int i = 0; i < kSums; ++i) {
        SAW_INT4_UNROLL
        for (int mask = 4; mask < 32; mask *= 2) sums[i] += dev::shfl_xor(sums[i], mask);
        if (g == 0) dev::st_shared(sums_of(way, nt * kRowsPerTile + 2 * c + u) + 4 * i, sums[i]);
      }
    }
  }
  dev::block_sync();
  const float unit = s.v_cap * (1.f / (1 << kWeightBits));
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      const int row = nt * kRowsPerTile + 2 * c + u;
      if (row >= used) continue;
      float sums[kSums] = {};
      SAW_INT4_UNROLL
      for (int other = 0; other < kWideWays; ++other) {
        SAW_INT4_UNROLL
        for (int i = 0; i < kSums; ++i) sums[i] += dev::ld_shared<float>(sums_of(other, row) + 4 * i);
      }
      const uint32_t record = records + (dev::warp_id() / kWideWays * kRows + row) * Record<D>::kBytes;
      if (way == 0 && g == 0) {
        const bool unseen = (s.unseen >> (2 * nt + u) & 1u) != 0;
        const auto reference = dev::ld_shared<float>(four.reference_at(row));
        dev::st_shared(record + Record<D>::kSumsAt, float2{unseen ? -INFINITY : reference, sums[0]});
      }
      SAW_INT4_UNROLL
      for (int i = 0; i < Map::kTiles; ++i) {
        const float centre = kGroups == 1 || map.group(i) == 0 ? sums[1] : sums[kSums - 1];
        const float2 x{dev::fma_rn(s.o[i][nt][u], unit, centre), dev::fma_rn(s.o[i][nt][u + 2], unit, centre)};
        dev::st_shared(record + (map.word * kCodesPerWord + 2 * map.pair(i)) * 4, x);
      }
    }
  }
}

}  // namespace saw_int4
