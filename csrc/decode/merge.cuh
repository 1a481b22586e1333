// Softmax pieces put together: over the warps that share a KV head (shared memory), then over the blocks that share a
// run of tiles (workspace, read by whichever block counts itself last, or by a second launch, merge_kernel.cuh). Pieces
// are (m, l, O): a reference in log2 units, up to kSlack below the largest logit (softmax.cuh), sum of 2^(logit - m),
// and sum of 2^(logit - m) v. They are added in a fixed order: same bits in every run.
//
// One warp per query row, lane l holds channels l*N .. l*N + N - 1: rotation of the output is a warp's business too.
#pragma once

#include "common/rows.cuh"
#include "decode/query.cuh"

namespace saw_int4 {

template <int D>
struct RowPiece {
  static constexpr int kPerLane = D <= 128 ? 4 : 8;
  float m = -INFINITY, l = 0.f;
  float o[kPerLane];
};

template <int D>
SAW_INT4_DEVICE bool lane_has_channels() {
  return dev::lane_id() * RowPiece<D>::kPerLane < D;
}

// 2^(m - reference), for pieces that saw nothing (m = reference = -inf) too.
SAW_INT4_DEVICE float piece_weight(float m, float reference) {
  return m == reference ? 1.f : dev::exp2_approx(m - reference);
}

// Writes one finished row: sink, division, rotation of V undone, rounding.
template <int D>
SAW_INT4_DEVICE void write_row(const DecodeParams& p, RowPiece<D>& row, int64_t token, int head) {
  constexpr int N = RowPiece<D>::kPerLane;
  float m = row.m, l = row.l, keep = 1.f;
  if (p.sinks != nullptr) {
    const float sink = dev::ld_global(p.sinks + head) * kLog2e;
    m = dev::fmax(row.m, sink);
    keep = piece_weight(row.m, m);
    l = dev::fma_rn(l, keep, piece_weight(sink, m));
  }
  const int order = p.transform.rotate_v ? p.transform.rotation_order : 1;
  const float inverse = l == 0.f ? 0.f : keep * hadamard_norm(order) * dev::rcp_approx(l);
  SAW_INT4_UNROLL
  for (int i = 0; i < N; ++i) row.o[i] *= inverse;
  if (order > 1) hadamard<N>(row.o, order);
  const int64_t out_row = token * p.num_q_heads + head;
  if (lane_has_channels<D>()) {
    uint16_t* out = static_cast<uint16_t*>(p.out) + out_row * D + dev::lane_id() * N;
    const uint2 low{pack_pair(row.o[0], row.o[1], p.dtype), pack_pair(row.o[2], row.o[3], p.dtype)};
    dev::st_global(reinterpret_cast<uint2*>(out), low);
    if constexpr (N == 8) {
      const uint2 high{pack_pair(row.o[4], row.o[5], p.dtype), pack_pair(row.o[6], row.o[7], p.dtype)};
      dev::st_global(reinterpret_cast<uint2*>(out) + 1, high);
    }
  }
  constexpr float kLn2 = 0.693147180559945309417f;
  if (p.lse != nullptr && dev::lane_id() == 0) {
    const float lse = l == 0.f ? -INFINITY : (m + dev::log2_approx(l)) * kLn2;
    dev::st_global(p.lse + out_row, lse);
  }
}

// The same for a row of a run, in the order in which a piece stores them: those of all its heads, heads fastest.
template <int D>
SAW_INT4_DEVICE void finish_row(const DecodeParams& p, const DecodePlan& plan, const QueryRows& rows, int kv_head,
                                RowPiece<D>& sum, int index) {
  const int head = index & (plan.heads_per_block - 1), row = index >> plan.heads_shift;
  write_row<D>(p, sum, rows.first_token + rows.token(row), (kv_head + head) * rows.group + rows.head(row));
}

// Where piece i of a run lies in the workspace.
SAW_INT4_DEVICE uint8_t* piece_memory(const DecodeParams& p, const DecodePlan& plan, const Share& share, int i) {
  return static_cast<uint8_t*>(p.workspace) + share.slot(i) * plan.piece_floats * 4;
}

// A row of a piece, in shared memory and in the workspace alike: O, then m, l and two words of padding. Records of
// shared memory are thus 16 bytes apart in banks.
template <int D>
struct Record {
  static constexpr int kBytes = (D + kRecordPadding) * 4, kSumsAt = D * 4;
  // Byte position of the lane's channels; lanes past the end have none.
  static SAW_INT4_DEVICE int at() { return dev::lane_id() * RowPiece<D>::kPerLane * 4; }
};

// Stores a row by `store(byte position, float4)`.
template <int D, typename Store>
SAW_INT4_DEVICE void store_record(const RowPiece<D>& row, const Store& store) {
  if (dev::lane_id() == 0) store(Record<D>::kSumsAt, float4{row.m, row.l, 0.f, 0.f});
  if (!lane_has_channels<D>()) return;
  SAW_INT4_UNROLL
  for (int i = 0; i < RowPiece<D>::kPerLane; i += 4)
    store(Record<D>::at() + 4 * i, float4{row.o[i], row.o[i + 1], row.o[i + 2], row.o[i + 3]});
}

// Adds up n records of one row: sums(i) is (m, l) of record i, channels(i, e) the lane's channels e .. e + 3. Records
// come kAtOnce at a time, all their loads together: one trip to memory each.
template <int D, typename Sums, typename Channels>
SAW_INT4_DEVICE RowPiece<D> sum_records(int n, const Sums& sums, const Channels& channels) {
  constexpr int N = RowPiece<D>::kPerLane, kAtOnce = 4;
  const bool has_channels = lane_has_channels<D>();
  RowPiece<D> sum;
  SAW_INT4_UNROLL
  for (int e = 0; e < N; ++e) sum.o[e] = 0.f;
  SAW_INT4_UNROLL_BY(1)
  for (int base = 0; base < n; base += kAtOnce) {
    float2 ml[kAtOnce];
    float4 o[kAtOnce][N / 4];
    float top = sum.m;
    SAW_INT4_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const bool valid = base + i < n;
      ml[i] = valid ? sums(base + i) : float2{-INFINITY, 0.f};
      SAW_INT4_UNROLL
      for (int e = 0; e < N; e += 4)
        o[i][e / 4] = valid && has_channels ? channels(base + i, e) : float4{0.f, 0.f, 0.f, 0.f};
    }
    SAW_INT4_UNROLL
    for (int i = 0; i < kAtOnce; ++i) top = dev::fmax(top, ml[i].x);
    const float keep = piece_weight(sum.m, top);
    sum.m = top;
    sum.l *= keep;
    SAW_INT4_UNROLL
    for (int e = 0; e < N; ++e) sum.o[e] *= keep;
    SAW_INT4_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const float w = piece_weight(ml[i].x, top);
      sum.l = dev::fma_rn(ml[i].y, w, sum.l);
      SAW_INT4_UNROLL
      for (int e = 0; e < N; e += 4) {
        sum.o[e] = dev::fma_rn(o[i][e / 4].x, w, sum.o[e]);
        sum.o[e + 1] = dev::fma_rn(o[i][e / 4].y, w, sum.o[e + 1]);
        sum.o[e + 2] = dev::fma_rn(o[i][e / 4].z, w, sum.o[e + 2]);
        sum.o[e + 3] = dev::fma_rn(o[i][e / 4].w, w, sum.o[e + 3]);
      }
    }
  }
  return sum;
}

// The same for records of shared memory, `stride` bytes apart.
template <int D>
SAW_INT4_DEVICE RowPiece<D> sum_shared_records(uint32_t first, int stride, int n) {
  return sum_records<D>(
      n, [&](int i) { return dev::ld_shared<float2>(first + i * stride + Record<D>::kSumsAt); },
      [&](int i, int e) { return dev::ld_shared<float4>(first + i * stride + Record<D>::at() + 4 * e); });
}

// A row of those pieces of a run that one of `ways` warps adds up: of piece `way` and of every ways-th after it.
template <int D>
class PiecesOfWarp {
 public:
  SAW_INT4_DEVICE PiecesOfWarp(const DecodeParams& p, const DecodePlan& plan, const Share& share, int row, int way,
                               int ways)
      : step_(plan.piece_floats * 4 * share.slot_step * ways),
        first_(piece_memory(p, plan, share, way) + row * Record<D>::kBytes),
        others_(piece_memory(p, plan, share, way + ways) + row * Record<D>::kBytes - step_) {}

  // Of the first n of them.
  SAW_INT4_DEVICE RowPiece<D> sum(int n) const {
    const auto at = [&](int i) { return i == 0 ? first_ : others_ + i * step_; };
    return sum_records<D>(
        n, [&](int i) { return dev::ld_global_coherent(reinterpret_cast<const float2*>(at(i) + Record<D>::kSumsAt)); },
        [&](int i, int e) {
          return dev::ld_global_coherent(reinterpret_cast<const float4*>(at(i) + Record<D>::at() + 4 * e));
        });
  }

 private:
  int64_t step_;  // bytes between them, but the run's piece 0
  const uint8_t *first_, *others_;
};

}  // namespace saw_int4
