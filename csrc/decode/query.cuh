// The query rows of one KV head as MMA operands: q' = sign * H_R(q * s), then normalised by a power of two to
// |q'| <= 2^kQueryBits and rounded to fp16, so that outliers neither overflow nor flush their row.
//
// The warps of a block share the rows of all its heads: a row is transformed once, by 16 or 32 lanes that hold 4 or 8
// neighbouring channels each, and left in shared memory for every warp of its head: in narrow passes as the fragments
// that go to registers, where lane = 4g + c finds, of query row g, the channels of words 4j + c, j = 0, 1, ...: exactly
// what the B fragments of k-steps 2j and 2j + 1 need; in wide ones as the matrices that shared_mma takes.
//
// Scores (in units of log2): a key with codes x, scale a and offset o gives
//     k * (a * q'.x + o * sum(q')) + c0
// (for each group of channels, summed before c0 is added) with k = sm_scale * log2(e) * (power of two), c0 = log2(e) *
// sm_scale * q.mu, and of the rounded q' in both places. The tensor cores deliver q'.x * 2^-24, and the key's scale
// takes that back (fragments.cuh): k has no room for it beside the largest q.
#pragma once

#include "common/rows.cuh"
#include "decode/config.h"
#include "decode/cursor.cuh"
#include "decode/fragments.cuh"

namespace saw_int4 {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr int kQueryBits = 15;  // as large as fp16 allows: the fewest small q' are subnormal

// Four 16-bit floats, fp16 or bf16.
SAW_INT4_DEVICE void widen_four(const uint2& v, bool is_fp16, float* x) {
  const uint32_t words[2] = {v.x, v.y};
  SAW_INT4_UNROLL
  for (int j = 0; j < 2; ++j) {
    const auto lo = static_cast<uint16_t>(words[j]), hi = static_cast<uint16_t>(words[j] >> 16);
    x[2 * j] = is_fp16 ? dev::f16_to_float(lo) : dev::bf16_to_float(lo);
    x[2 * j + 1] = is_fp16 ? dev::f16_to_float(hi) : dev::bf16_to_float(hi);
  }
}

// Where the query of one KV head lies in shared memory.
template <int D, int NT, int kGroups>
struct QueryLayout {
  static constexpr bool kWide = is_wide(NT);
  static constexpr int kWords = query_words_per_lane(D);  // of a lane, in narrow passes
  static constexpr int kTermsAt = NT * kWords * 512;      // bytes of fragments before the terms
  static constexpr int kBytes = kTermsAt + NT * kRowsPerTile * kScoreTermsBytes;
  static_assert(kBytes == query_bytes(D, NT));

  // The pair of channels 2i, 2i + 1 of a word, for one row.
  static SAW_INT4_DEVICE int pair_at(int row, int word, int i) {
    const int nt = row / kRowsPerTile, g = row % kRowsPerTile, j = word / 4, c = word % 4;
    // Wide: k-step 2j + i/2, its half i % 2, matrix nt, run g.
    if constexpr (kWide) return ((4 * j + i) * NT + nt) * 128 + g * 16 + c * 4;
    return (nt * kWords + j) * 512 + (4 * g + c) * 16 + 4 * i;
  }
  static SAW_INT4_DEVICE int terms_at(int row) { return kTermsAt + row * kScoreTermsBytes; }
};

// How a row lies while it is transformed: lane i of kLanes has channels kChannels * i and on; those past the row's end
// only take part in shuffles.
template <int D>
struct QueryLanes {
  static constexpr int kChannels = D <= 128 ? 4 : 8, kLanes = D <= 64 ? 16 : 32;
  static SAW_INT4_DEVICE int channel() { return dev::lane_id() % kLanes * kChannels; }
};

// The rows of a pass and of all the block's heads, dealt out to warps: turn t of a warp is 32 / kLanes of them. Heads
// count fastest, so that the rows in use come first.
template <int D, int NT>
struct QueryTurns {
  static constexpr int kLanes = QueryLanes<D>::kLanes, kRowsPerTurn = 32 / kLanes;
  int heads_shift, rows;  // log2 of the block's heads; rows in use

  SAW_INT4_DEVICE int first(int turn) const {
    return (turn * (dev::thread_count() / 32) + dev::warp_id()) * kRowsPerTurn;
  }
  SAW_INT4_DEVICE bool has(int turn) const { return first(turn) < kRowsPerTile * NT << heads_shift; }
  SAW_INT4_DEVICE bool any_used(int turn) const { return first(turn) >> heads_shift < rows; }
  SAW_INT4_DEVICE int index(int turn) const { return first(turn) + dev::lane_id() / kLanes; }
  SAW_INT4_DEVICE int row(int turn) const { return index(turn) >> heads_shift; }
  SAW_INT4_DEVICE int head(int turn) const { return index(turn) & ((1 << heads_shift) - 1); }
  SAW_INT4_DEVICE bool used(int turn) const { return row(turn) < rows && QueryLanes<D>::channel() < D; }
};

// The lane's channels of its row, as they lie in memory; zeros where there are none.
template <int D>
struct RawQuery {
  uint2 words[QueryLanes<D>::kChannels / 4];
};

template <int D, int NT>
SAW_INT4_DEVICE RawQuery<D> fetch_query(const DecodeParams& p, const QueryRows& rows, int kv_head,
                                        const QueryTurns<D, NT>& turns, int turn) {
  RawQuery<D> raw = {};
  if (!turns.used(turn)) return raw;
  const int row = turns.row(turn), q_head = (kv_head + turns.head(turn)) * rows.group + rows.head(row);
  const auto* base = static_cast<const uint16_t*>(p.q) + (rows.first_token + rows.token(row)) * p.q_token_stride;
  const auto* words = reinterpret_cast<const uint2*>(base + (q_head * D + QueryLanes<D>::channel()));
  SAW_INT4_UNROLL
  for (int i = 0; i < QueryLanes<D>::kChannels / 4; ++i) raw.words[i] = dev::ld_global(words + i);
  return raw;
}

// The lane's channels as MMA operands; what scores are made of (above), the same in all the row's lanes.
template <int D, int kGroups>
struct TransformedQuery {
  uint32_t pairs[QueryLanes<D>::kChannels / 2] = {};
  float qsum[kGroups] = {};  // of each group's channels
  float k = 0.f, c0 = 0.f, c0_per_k = 0.f;
};

// channel: the lane's first, of all KV heads; in_row: the lane has any.
template <int kGroups, int D>
SAW_INT4_DEVICE TransformedQuery<D, kGroups> transform_row(const DecodeParams& p, const RawQuery<D>& raw, int channel,
                                                           bool in_row) {
  constexpr int N = QueryLanes<D>::kChannels, kLanes = QueryLanes<D>::kLanes;
  const int order = p.transform.rotation_order;
  const bool calibrated = p.transform.k_mean != nullptr && in_row;
  const auto factors = [&](const float* base, int i) {
    return dev::ld_global(reinterpret_cast<const float4*>(base + channel + i));
  };
  float x[N], mean_score = 0.f;
  SAW_INT4_UNROLL
  for (int i = 0; i < N; i += 4) widen_four(raw.words[i / 4], p.dtype == DType::kFloat16, &x[i]);
  if (calibrated) {
    SAW_INT4_UNROLL
    for (int i = 0; i < N; i += 4) {
      const float4 mean = factors(p.transform.k_mean, i), scale = factors(p.transform.k_scale, i);
      mean_score = dev::fma_rn(x[i], mean.x, mean_score);
      mean_score = dev::fma_rn(x[i + 1], mean.y, mean_score);
      mean_score = dev::fma_rn(x[i + 2], mean.z, mean_score);
      mean_score = dev::fma_rn(x[i + 3], mean.w, mean_score);
      x[i] *= scale.x;
      x[i + 1] *= scale.y;
      x[i + 2] *= scale.z;
      x[i + 3] *= scale.w;
    }
  }
  // The usual order as a constant: without branches between its shuffles.
  constexpr int kFullOrder = D & -D;
  if (order == kFullOrder)
    hadamard<N>(x, kFullOrder);
  else
    hadamard<N>(x, order);
  if (calibrated) {
    SAW_INT4_UNROLL
    for (int i = 0; i < N; i += 4) {
      const float4 sign = factors(p.transform.k_sign, i);
      x[i] *= sign.x;
      x[i + 1] *= sign.y;
      x[i + 2] *= sign.z;
      x[i + 3] *= sign.w;
    }
  }
  float largest = 0.f;
  SAW_INT4_UNROLL
  for (int i = 0; i < N; ++i) largest = dev::fmax(largest, dev::fmax(x[i], -x[i]));
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) largest = dev::fmax(largest, dev::shfl_xor(largest, mask));
  // 2 ** exponent > largest; the power of two that brings it to 2 ** kQueryBits, and its inverse, are normal numbers.
  uint32_t exponent = (dev::float_bits(largest) >> 23) + 1;
  exponent = exponent <= kQueryBits ? kQueryBits + 1 : exponent;
  const float shrink = dev::bits_float((254 + kQueryBits - exponent) << 23);
  const float grow = dev::bits_float((exponent - kQueryBits) << 23);
  float qsum[kGroups] = {};
  TransformedQuery<D, kGroups> q;
  SAW_INT4_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    const float factor = i % 2 ? shrink / kOddPairFactor : shrink;
    q.pairs[i] = dev::pack_f16x2(x[2 * i] * factor, x[2 * i + 1] * factor);
    const float r0 = dev::f16_to_float(static_cast<uint16_t>(q.pairs[i]));
    const float r1 = dev::f16_to_float(static_cast<uint16_t>(q.pairs[i] >> 16));
    const int g = N < kCodesPerWord ? 0 : group_of_channel(2 * i, kGroups);
    qsum[g] = dev::fma_rn(i % 2 ? kOddPairFactor : 1.f, r0 + r1, qsum[g]);
  }
  if constexpr (kGroups > 1 && N < kCodesPerWord) {  // all the lane's channels are of one group
    if (group_of_channel(channel, kGroups) == 1) {
      qsum[1] = qsum[0];
      qsum[0] = 0.f;
    }
  }
  SAW_INT4_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    SAW_INT4_UNROLL
    for (int g = 0; g < kGroups; ++g) qsum[g] += dev::shfl_xor(qsum[g], mask);
    mean_score += dev::shfl_xor(mean_score, mask);
  }
  const float norm = order == kFullOrder ? hadamard_norm(kFullOrder) : hadamard_norm(order);
  const float unit = p.sm_scale * kLog2e;
  q.k = unit * norm * grow;
  SAW_INT4_UNROLL
  for (int g = 0; g < kGroups; ++g) q.qsum[g] = qsum[g];
  q.c0 = unit * mean_score;
  q.c0_per_k = dev::div_rn(mean_score * shrink, norm);  // k itself may be 0
  return q;
}

// What the row's scores need beside its fragments, to shared memory. Narrow passes have it multiplied by k; wide ones
// multiply last.
template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void store_terms(uint32_t query, int row, const TransformedQuery<D, kGroups>& q) {
  using Layout = QueryLayout<D, NT, kGroups>;
  const uint32_t terms = query + Layout::terms_at(row);
  if constexpr (Layout::kWide)
    dev::st_shared(terms, float4{q.k, q.c0_per_k, q.qsum[0], q.qsum[kGroups - 1]});
  else
    dev::st_shared(terms, float4{q.k, q.c0, q.k * q.qsum[0], q.k * q.qsum[kGroups - 1]});
}

// Transforms one turn's rows to fragments and terms in shared memory; rows not in use become zeros.
template <int kGroups, int D, int NT>
SAW_INT4_DEVICE void transform_query(const DecodeParams& p, int kv_head, const QueryTurns<D, NT>& turns, int turn,
                                     const RawQuery<D>& raw, uint32_t shared) {
  using Layout = QueryLayout<D, NT, kGroups>;
  const int channel = QueryLanes<D>::channel(), row = turns.row(turn), head = turns.head(turn);
  TransformedQuery<D, kGroups> q;
  if (turns.any_used(turn)) q = transform_row<kGroups>(p, raw, (kv_head + head) * D + channel, turns.used(turn));
  const uint32_t at = shared + head * Layout::kBytes;
  const int word = channel / kCodesPerWord;
  SAW_INT4_UNROLL
  for (int i = 0; i < QueryLanes<D>::kChannels / 2; i += 2) {
    if (word >= 4 * Layout::kWords) continue;
    const int pair = channel % kCodesPerWord / 2 + i;
    if constexpr (Layout::kWide) {
      dev::st_shared(at + Layout::pair_at(row, word, pair), q.pairs[i]);
      dev::st_shared(at + Layout::pair_at(row, word, pair + 1), q.pairs[i + 1]);
    } else {
      dev::st_shared(at + Layout::pair_at(row, word, pair), uint2{q.pairs[i], q.pairs[i + 1]});
    }
  }
  if (channel == 0) store_terms<D, NT>(at, row, q);
}

}  // namespace saw_int4
