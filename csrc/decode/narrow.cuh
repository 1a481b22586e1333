// A pass of up to 8 query rows, or 16 of head_dim 64, 128 and 256. A warp owns one KV head and 32 tokens per tile, and
// has all their channels; lane = 4g + c holds, for QK, tokens g and g + 8 and every fourth word of them; for PV, tokens
// 2c, 2c+1, 2c+8, 2c+9 and word g of every eight: two byte permutes put the codes of two tokens side by side. S^T
// becomes the operand P^T by one 8x8 transpose per 16 tokens. Scales stay outside the products (query.cuh,
// fragments.cuh). With two groups per row each has a product and weights of its own: k-steps of QK and MMAs of PV
// alternate between groups by format.h's choice of channels, so that loads and MMAs are as many as for one.
//
// Bound: HBM. A head_dim 128 row pair of 32 tokens is 4352 bytes, 300 cycles of an H100 SM's share (14.5 B/cycle) =
// 1200 issue slots; the inner loop issues about 500 (csrc/README.md counts them in the SASS).
#pragma once

#include "decode/merge.cuh"
#include "decode/softmax.cuh"

namespace saw_int4 {

// What turns the accumulators of query rows 8*nt + 2c + u, u = 0, 1, into logits: query.cuh.
template <int kGroups>
struct ScoreTerms {
  float k, c0, qsum[kGroups];  // qsum is multiplied by k already
};

template <int D, int NT, int kGroups>
struct NarrowQuery {
  using Layout = QueryLayout<D, NT, kGroups>;
  static constexpr int kWords = Layout::kWords;
  static constexpr bool kInRegisters = query_in_registers(NT);

  uint4 registers[kInRegisters ? NT : 1][kInRegisters ? kWords : 1];
  ScoreTerms<kGroups> register_terms[kInRegisters ? NT : 1][2];
  uint32_t shared;  // address of the KV head's fragments and terms

  SAW_INT4_DEVICE uint4 fragment(int nt, int j) const {
    return kInRegisters ? registers[nt][j] : shared_fragment(nt, j);
  }
  SAW_INT4_DEVICE ScoreTerms<kGroups> terms(int nt, int u) const {
    return kInRegisters ? register_terms[nt][u] : shared_terms(nt, u);
  }
  // Takes the head's rows out of shared memory for good, where registers have room for them.
  SAW_INT4_DEVICE void load() {
    if constexpr (kInRegisters) {
      SAW_INT4_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        SAW_INT4_UNROLL
        for (int j = 0; j < kWords; ++j) registers[nt][j] = shared_fragment(nt, j);
        SAW_INT4_UNROLL
        for (int u = 0; u < 2; ++u) register_terms[nt][u] = shared_terms(nt, u);
      }
    }
  }

 private:
  SAW_INT4_DEVICE uint4 shared_fragment(int nt, int j) const {
    return dev::ld_shared<uint4>(shared + (nt * kWords + j) * 512 + dev::lane_id() * 16);
  }
  SAW_INT4_DEVICE ScoreTerms<kGroups> shared_terms(int nt, int u) const {
    const uint32_t at = shared + Layout::terms_at(nt * kRowsPerTile + 2 * (dev::lane_id() % 4) + u);
    const auto terms = dev::ld_shared<float4>(at);
    ScoreTerms<kGroups> t;
    t.k = terms.x;
    t.c0 = terms.y;
    t.qsum[0] = terms.z;
    if constexpr (kGroups > 1) t.qsum[1] = terms.w;
    return t;
  }
};

// Running softmax of a warp's query rows: lane 4g + c, rows 8*nt + 2c + u. l and extra are this lane's share (its
// tokens only). o counts v in units of v_cap * 2^-kWeightBits times (code - 8); extra has what is the same in every
// channel of a group.
template <int D, int NT, int kGroups>
struct NarrowState {
  static constexpr int kWordGroups = (D + 63) / 64;  // of 8 words, one per g
  float m[NT][2], l[NT][2] = {}, extra[kGroups][NT][2] = {};
  float o[NT][4 * kWordGroups][4] = {};
  float v_cap = 0.f;  // power of two above every scale of V so far, 0 before the first

  SAW_INT4_DEVICE NarrowState() {
    SAW_INT4_UNROLL
    for (int nt = 0; nt < NT; ++nt) m[nt][0] = m[nt][1] = -INFINITY;
  }
};

// Moves the references (largest logit, largest scale of V) to what the warp has seen. Rare after the first tiles.
template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void rescale(NarrowState<D, NT, kGroups>& s, const float (&largest)[NT][2], float v_scale) {
  SAW_INT4_UNROLL
  for (int mask = 4; mask < 32; mask *= 2) v_scale = dev::fmax(v_scale, dev::shfl_xor(v_scale, mask));
  const float v_keep = raise_cap(s.v_cap, v_scale);  // the same in all lanes
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

// Weights of 16 tokens: w[0] (logits) -> w[group] = p * scale in units of v_unit. kMasked: logits of -inf weigh
// nothing, even when the token's parameters are NaN.
template <bool kMasked, int D, int NT, int kGroups>
SAW_INT4_DEVICE void weigh(NarrowState<D, NT, kGroups>& s, float (&w)[kGroups][NT][4],
                           const float (&v_weight)[kGroups][2], const float (&v_extra)[kGroups][2]) {
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

// MT * 16 tokens of one KV head; k_row, v_row: shared addresses of the first token's row, `stride` bytes apart.
template <int MT, int D, int NT, int kGroups>
SAW_INT4_DEVICE void attend(NarrowState<D, NT, kGroups>& s, const NarrowQuery<D, NT, kGroups>& query, uint32_t k_row,
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
      code_pairs(dev::ld_shared<uint32_t>(at), low[mt]);
      code_pairs(dev::ld_shared<uint32_t>(at + 8 * stride), high[mt]);
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
        scale[group] = kCodesPerUnit * param_scale(k_params[group]);
        offset[group] = param_offset(k_params[group]);
      }
      SAW_INT4_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        SAW_INT4_UNROLL
        for (int u = 0; u < 2; ++u) {
          const ScoreTerms<kGroups> t = query.terms(nt, u);
          float logit = t.c0;
          SAW_INT4_UNROLL
          for (int group = 0; group < kGroups; ++group) {
            logit = dev::fma_rn(scale[group], t.k * w[mt][group][nt][2 * half + u],
                                dev::fma_rn(offset[group], t.qsum[group], logit));
          }
          w[mt][0][nt][2 * half + u] = logit;
        }
      }
      SAW_INT4_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        float& weight = v_weight[mt][group][half];
        weight = param_scale(v_params[group]);
        v_extra[mt][group][half] = dev::fma_rn(kCodeCentre, weight, param_offset(v_params[group]));
        v_scale = dev::fmax(v_scale, weight);
      }
    }
  }
  if (logit_cap > 0.f) {
    const SoftCap soft_cap(logit_cap);
    SAW_INT4_UNROLL
    for (int mt = 0; mt < MT; ++mt) {
      SAW_INT4_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        SAW_INT4_UNROLL
        for (int e = 0; e < 4; ++e) w[mt][0][nt][e] = soft_cap(w[mt][0][nt][e]);
      }
    }
  }
  if (masked) hide(w, token, masks);
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

  const float unit = v_unit(s.v_cap);
  uint32_t p[MT][kGroups][NT][2];
  SAW_INT4_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    SAW_INT4_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      SAW_INT4_UNROLL
      for (int half = 0; half < 2; ++half) v_weight[mt][group][half] *= unit;
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

// The sums of the warp's rows of one row tile, the first `used` of them, to records in shared memory, 8 rows a warp.
template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void store_records(const NarrowState<D, NT, kGroups>& s, int nt, int used, uint32_t records) {
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4;
  const uint32_t mine = records + dev::warp_id() * kRowsPerTile * Record<D>::kBytes;
  const float unit = s.v_cap * (1.f / (1 << kWeightBits));
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
}

}  // namespace saw_int4
