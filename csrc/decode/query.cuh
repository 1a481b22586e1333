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
  uint4 registers[kInRegisters ? NT : 1][kInRegisters ? kWords : 1];
  uint32_t shared;  // address of this lane's first fragment, when they lie in shared memory
  ScoreTerms terms[NT][2];

  SAW_INT4_DEVICE uint4 fragment(int nt, int j) const {
    if constexpr (kInRegisters)
      return registers[nt][j];
    else
      return dev::ld_shared<uint4>(shared + (nt * kWords + j) * 512);
  }
};

template <int D, int NT>
SAW_INT4_DEVICE void load_query(Query<D, NT>& query, const DecodeParams& p, const QueryRows& rows, int kv_head,
                                bool writes_shared) {
  constexpr int kWords = Query<D, NT>::kWords;
  const int g = dev::lane_id() / 4, c = dev::lane_id() % 4, order = p.transform.rotation_order;
  const float norm = hadamard_norm(order);
  SAW_INT4_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    const int row = nt * kRowsPerTile + g;
    const int64_t base =
        (rows.first_token + rows.token(row)) * p.q_token_stride + (kv_head * rows.group + rows.head(row)) * D;
    float x[kWords][8], mean_score = 0.f;
    SAW_INT4_UNROLL
    for (int j = 0; j < kWords; ++j) {
      const int channel = 8 * (4 * j + c);
      SAW_INT4_UNROLL
      for (int i = 0; i < 8; ++i) x[j][i] = 0.f;
      if (row >= rows.rows || channel >= D) continue;
      load_channels(p.q, base + channel, p.dtype, x[j]);
      if (p.transform.k_mean == nullptr) continue;
      float mean[8], scale[8];
      load_channels(p.transform.k_mean, kv_head * D + channel, DType::kFloat32, mean);
      load_channels(p.transform.k_scale, kv_head * D + channel, DType::kFloat32, scale);
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
        load_channels(p.transform.k_sign, kv_head * D + channel, DType::kFloat32, sign);
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
        dev::st_shared(query.shared + (nt * kWords + j) * 512, fragment);
    }
    SAW_INT4_UNROLL
    for (int mask = 1; mask < 4; mask *= 2) {
      rounded_sum += dev::shfl_xor(rounded_sum, mask);
      qsum += dev::shfl_xor(qsum, mask);
      mean_score += dev::shfl_xor(mean_score, mask);
    }
    const float unit = p.sm_scale * kLog2e, k = unit * norm * grow;
    SAW_INT4_UNROLL
    for (int u = 0; u < 2; ++u) {
      const int source = 4 * (2 * c + u);
      ScoreTerms& t = query.terms[nt][u];
      t.k = dev::shfl_idx(k, source);
      t.bias = dev::shfl_idx(k * (kCodeBias * rounded_sum), source);
      t.qsum = dev::shfl_idx(k * qsum, source);
      t.c0 = dev::shfl_idx(unit * mean_score, source);
    }
  }
}

}  // namespace saw_int4
