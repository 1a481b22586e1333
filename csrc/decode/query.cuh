// The query rows of one KV head as MMA operands: q' = sign * H_R(q * s), then normalised by a power of two to |q'| <= 1
// and rounded to fp16, so that outliers neither overflow nor flush their row.
//
// lane = 4g + c holds, of query row g of each row tile, the channels of words 4j + c, j = 0, 1, ...: exactly what the
// B fragments of k-steps 2j and 2j + 1 need. Hadamard strides 1, 2, 4 lie in a lane, 8 and 16 across c, the rest across
// j. Loaded, transformed and rounded once per (request, KV head), no shared memory needed.
//
// Scores (in units of log2): a key with codes x, scale a and offset o gives
//     k * (a * (q'.biased(x) - 1024 sum(r)) + o * qsum) + c0,    r: the rounded operands
// with k = sm_scale * log2(e) * (power of two), c0 = log2(e) * sm_scale * q.mu. Both sums are those of the rounded
// operands, so the bias cancels to the last bit of the accumulator.
#pragma once

#include "common/rows.cuh"
#include "decode/config.h"
#include "decode/cursor.cuh"
#include "decode/fragments.cuh"

namespace saw_int4 {

inline constexpr float kLog2e = 1.44269504088896340736f;

// What turns the accumulators of query rows 8*nt + 2c + u, u = 0, 1, into logits: see above.
struct ScoreTerms {
  float k, bias, qsum, c0;  // bias and qsum are multiplied by k already
};

template <int D, int NT>
struct Query {
  static constexpr int kWords = query_words_per_lane(D);
  static constexpr bool kInRegisters = query_in_registers(D, NT);
  static constexpr int kTermsAt = NT * kWords * 512;  // bytes of fragments before the terms, in shared memory
  static_assert(kTermsAt + NT * kRowsPerTile * 16 == query_bytes(D, NT));

  uint4 registers[kInRegisters ? NT : 1][kInRegisters ? kWords : 1];
  ScoreTerms register_terms[kInRegisters ? NT : 1][2];
  uint32_t shared;  // address of the KV head's fragments and terms, when they lie in shared memory

  SAW_INT4_DEVICE uint32_t fragment_at(int nt, int j) const {
    return shared + (nt * kWords + j) * 512 + dev::lane_id() * 16;
  }
  SAW_INT4_DEVICE uint4 fragment(int nt, int j) const {
    if constexpr (kInRegisters)
      return registers[nt][j];
    else
      return dev::ld_shared<uint4>(fragment_at(nt, j));
  }
  SAW_INT4_DEVICE uint32_t terms_at(int row) const { return shared + kTermsAt + row * 16; }
  SAW_INT4_DEVICE ScoreTerms terms(int nt, int u) const {
    if constexpr (kInRegisters) {
      return register_terms[nt][u];
    } else {
      const auto t = dev::ld_shared<float4>(terms_at(nt * kRowsPerTile + 2 * (dev::lane_id() % 4) + u));
      return {t.x, t.y, t.z, t.w};
    }
  }
};

// The rows as they lie in memory. Fetched without a branch, so that all loads are in flight together, and before the
// copies are issued; rows and channels past the end are those of the first, and zeroed when used.
template <int D, int NT>
struct RawQuery {
  uint4 words[NT][query_words_per_lane(D)];
};

template <int D, int NT>
SAW_INT4_DEVICE void fetch_query(RawQuery<D, NT>& raw, const DecodeParams& p, const QueryRows& rows, int kv_head) {
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4;
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    const int row = nt * kRowsPerTile + g < rows.rows ? nt * kRowsPerTile + g : 0;
    const auto* base = static_cast<const uint16_t*>(p.q) + ((rows.first_token + rows.token(row)) * p.q_token_stride +
                                                            (kv_head * rows.group + rows.head(row)) * D);
    SAW_INT4_UNROLL
    for (int j = 0; j < query_words_per_lane(D); ++j) {
      const int channel = 8 * (4 * j + c) < D ? 8 * (4 * j + c) : 0;
      raw.words[nt][j] = dev::ld_global(reinterpret_cast<const uint4*>(base + channel));
    }
  }
}

template <int D, int NT>
SAW_INT4_DEVICE void transform_query(Query<D, NT>& query, const RawQuery<D, NT>& raw, const DecodeParams& p,
                                     const QueryRows& rows, int kv_head, bool writes_shared) {
  constexpr int kWords = Query<D, NT>::kWords;
  const int c = dev::lane_id() % 4, order = p.transform.rotation_order;
  const float norm = hadamard_norm(order);
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    const bool used = nt * kRowsPerTile + dev::lane_id() / 4 < rows.rows;
    float x[kWords][8], mean_score = 0.f;
    SAW_INT4_UNROLL
    for (int j = 0; j < kWords; ++j) {
      const int channel = 8 * (4 * j + c);
      const uint4 zero{0, 0, 0, 0};
      widen_half(used && channel < D ? raw.words[nt][j] : zero, p.dtype == DType::kFloat16, x[j]);
      if (p.transform.k_mean == nullptr || channel >= D) continue;
      float mean[8], scale[8];
      load_channels<DType::kFloat32>(p.transform.k_mean, kv_head * D + channel, mean);
      load_channels<DType::kFloat32>(p.transform.k_scale, kv_head * D + channel, scale);
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) {
        mean_score = dev::fma_rn(x[j][i], mean[i], mean_score);
        x[j][i] *= scale[i];
      }
    }
    SAW_INT4_UNROLL
    for (int j = 0; j < kWords; ++j) {
      SAW_INT4_UNROLL
      for (int stride = 1; stride < 8; stride *= 2) {
        if (stride >= order) continue;
        SAW_INT4_UNROLL
        for (int i = 0; i < 8; ++i) {
          if (i & stride) continue;
          const float lo = x[j][i], hi = x[j][i + stride];
          x[j][i] = lo + hi;
          x[j][i + stride] = lo - hi;
        }
      }
      SAW_INT4_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) {
        if (8 * mask >= order) continue;
        SAW_INT4_UNROLL
        for (int i = 0; i < 8; ++i) {
          const float other = dev::shfl_xor(x[j][i], mask);
          x[j][i] = c & mask ? other - x[j][i] : x[j][i] + other;
        }
      }
    }
    SAW_INT4_UNROLL
    for (int mask = 1; mask < kWords; mask *= 2) {
      if (32 * mask >= order) continue;
      SAW_INT4_UNROLL
      for (int j = 0; j < kWords; ++j) {
        // Where D is no power of two, order stays below it and no partner lies past the end.
        if ((j & mask) || j + mask >= kWords) continue;
        SAW_INT4_UNROLL
        for (int i = 0; i < 8; ++i) {
          const float lo = x[j][i], hi = x[j + mask][i];
          x[j][i] = lo + hi;
          x[j + mask][i] = lo - hi;
        }
      }
    }
    float largest = 0.f;
    SAW_INT4_UNROLL
    for (int j = 0; j < kWords; ++j) {
      const int channel = 8 * (4 * j + c);
      if (p.transform.k_sign != nullptr && channel < D) {
        float sign[8];
        load_channels<DType::kFloat32>(p.transform.k_sign, kv_head * D + channel, sign);
        SAW_INT4_UNROLL
        for (int i = 0; i < 8; ++i) x[j][i] *= sign[i];
      }
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) largest = dev::fmax(largest, dev::fmax(x[j][i], -x[j][i]));
    }
    largest = dev::fmax(largest, dev::shfl_xor(largest, 1));
    largest = dev::fmax(largest, dev::shfl_xor(largest, 2));
    // 2 ** exponent > largest; both it and its inverse are normal numbers.
    uint32_t exponent = (dev::float_bits(largest) >> 23) + 1;
    exponent = exponent > 253 ? 253 : exponent;
    const float shrink = dev::bits_float((254 - exponent) << 23), grow = dev::bits_float(exponent << 23);
    float rounded_sum = 0.f, qsum = 0.f;
    SAW_INT4_UNROLL
    for (int j = 0; j < kWords; ++j) {
      uint32_t pairs[4];
      SAW_INT4_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float factor = i % 2 ? shrink / kOddPairFactor : shrink;
        pairs[i] = dev::pack_f16x2(x[j][2 * i] * factor, x[j][2 * i + 1] * factor);
        const float r0 = dev::f16_to_float(static_cast<uint16_t>(pairs[i]));
        const float r1 = dev::f16_to_float(static_cast<uint16_t>(pairs[i] >> 16));
        rounded_sum += r0 + r1;
        qsum = dev::fma_rn(i % 2 ? kOddPairFactor : 1.f, r0 + r1, qsum);
      }
      const uint4 fragment{pairs[0], pairs[1], pairs[2], pairs[3]};
      if constexpr (Query<D, NT>::kInRegisters)
        query.registers[nt][j] = fragment;
      else if (writes_shared)
        dev::st_shared(query.fragment_at(nt, j), fragment);
    }
    SAW_INT4_UNROLL
    for (int mask = 1; mask < 4; mask *= 2) {
      rounded_sum += dev::shfl_xor(rounded_sum, mask);
      qsum += dev::shfl_xor(qsum, mask);
      mean_score += dev::shfl_xor(mean_score, mask);
    }
    const float unit = p.sm_scale * kLog2e, k = unit * norm * grow;
    const ScoreTerms mine{k, k * (kCodeBias * rounded_sum), k * qsum, unit * mean_score};  // of row g
    if constexpr (Query<D, NT>::kInRegisters) {
      SAW_INT4_UNROLL
      for (int u = 0; u < 2; ++u) {
        const int source = 4 * (2 * c + u);
        query.register_terms[nt][u] = {dev::shfl_idx(mine.k, source), dev::shfl_idx(mine.bias, source),
                                       dev::shfl_idx(mine.qsum, source), dev::shfl_idx(mine.c0, source)};
      }
    } else if (writes_shared && c == 0) {
      dev::st_shared(query.terms_at(nt * kRowsPerTile + dev::lane_id() / 4),
                     float4{mine.k, mine.bias, mine.qsum, mine.c0});
    }
  }
}

}  // namespace saw_int4
