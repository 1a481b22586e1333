// Softmax pieces put together: over the warps that share a KV head (shared memory), then over the blocks that share a
// run of tiles (workspace, read by whichever block counts itself last; no second launch). Pieces are (m, l, O): largest
// logit in log2 units, sum of 2^(logit - m), and sum of 2^(logit - m) v. They are added in a fixed order: same bits in
// every run.
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
  const float inverse = l == 0.f ? 0.f : dev::div_rn(keep * hadamard_norm(order), l);
  SAW_INT4_UNROLL
  for (int i = 0; i < N; ++i) row.o[i] *= inverse;
  hadamard<N>(row.o, order);
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

// Shared memory of one row tile: per warp 8 rows of (m, l), then of O, rows 16 bytes apart in banks.
template <int D>
struct WarpPieces {
  static constexpr int kRowBytes = (D + 4) * 4;
  uint32_t base;
  int warps;
  SAW_INT4_DEVICE uint32_t sums(int warp, int row) const { return base + (warp * kRowsPerTile + row) * 8; }
  SAW_INT4_DEVICE uint32_t values(int warp, int row) const {
    return base + warps * kRowsPerTile * 8 + (warp * kRowsPerTile + row) * kRowBytes;
  }
};

// Row `row` of the warps first_warp .. first_warp + ways - 1, which saw different tokens.
template <int D>
SAW_INT4_DEVICE RowPiece<D> merge_warps(const WarpPieces<D>& pieces, int first_warp, int ways, int row) {
  constexpr int N = RowPiece<D>::kPerLane;
  RowPiece<D> sum;
  SAW_INT4_UNROLL
  for (int i = 0; i < N; ++i) sum.o[i] = 0.f;
  SAW_INT4_UNROLL_BY(1)
  for (int w = 0; w < ways; ++w) sum.m = dev::fmax(sum.m, dev::ld_shared<float2>(pieces.sums(first_warp + w, row)).x);
  SAW_INT4_UNROLL_BY(2)
  for (int w = 0; w < ways; ++w) {
    const float2 ml = dev::ld_shared<float2>(pieces.sums(first_warp + w, row));
    const float weight = piece_weight(ml.x, sum.m);
    sum.l = dev::fma_rn(ml.y, weight, sum.l);
    if (!lane_has_channels<D>()) continue;
    SAW_INT4_UNROLL
    for (int i = 0; i < N; i += 4) {
      const auto o = dev::ld_shared<float4>(pieces.values(first_warp + w, row) + (dev::lane_id() * N + i) * 4);
      sum.o[i] = dev::fma_rn(o.x, weight, sum.o[i]);
      sum.o[i + 1] = dev::fma_rn(o.y, weight, sum.o[i + 1]);
      sum.o[i + 2] = dev::fma_rn(o.z, weight, sum.o[i + 2]);
      sum.o[i + 3] = dev::fma_rn(o.w, weight, sum.o[i + 3]);
    }
  }
  return sum;
}

// A slot of the workspace: O of heads_per_block * rows_per_head rows, 16-byte aligned, then their (m, l).
template <int D>
struct BlockPiece {
  float* base;
  int rows;
  SAW_INT4_DEVICE BlockPiece(const DecodeParams& p, const DecodePlan& plan, int slot)
      : base(static_cast<float*>(p.workspace) + slot * plan.piece_floats),
        rows(plan.heads_per_block * plan.rows_per_head) {}
  SAW_INT4_DEVICE float2* sums(int row) const { return reinterpret_cast<float2*>(base + rows * D) + row; }
  // The lane's channels of a row; lanes past the end get the first ones, to read and not to use.
  SAW_INT4_DEVICE float4* values(int row) const {
    const int channel = lane_has_channels<D>() ? dev::lane_id() * RowPiece<D>::kPerLane : 0;
    return reinterpret_cast<float4*>(base + row * D + channel);
  }
};

template <int D>
SAW_INT4_DEVICE void store_piece(const BlockPiece<D>& piece, int row, const RowPiece<D>& sum) {
  if (dev::lane_id() == 0) dev::st_global(piece.sums(row), float2{sum.m, sum.l});
  if (!lane_has_channels<D>()) return;
  SAW_INT4_UNROLL
  for (int i = 0; i < RowPiece<D>::kPerLane; i += 4)
    dev::st_global(piece.values(row) + i / 4, float4{sum.o[i], sum.o[i + 1], sum.o[i + 2], sum.o[i + 3]});
}

// Adds up row `row` of all pieces of a run.
template <int D>
SAW_INT4_DEVICE RowPiece<D> merge_blocks(const DecodeParams& p, const DecodePlan& plan, const Piece& run, int row) {
  constexpr int N = RowPiece<D>::kPerLane;
  RowPiece<D> sum;
  SAW_INT4_UNROLL
  for (int i = 0; i < N; ++i) sum.o[i] = 0.f;
  const int pieces = run.last_block - run.first_block + 1;
  for (int base = 0; base < pieces; base += 32) {
    // Lane i weighs piece base + i; then every lane adds its channels of all of them.
    float2 ml{-INFINITY, 0.f};
    if (base + dev::lane_id() < pieces)
      ml = dev::ld_global_coherent(BlockPiece<D>(p, plan, run.slot(run.first_block + base + dev::lane_id())).sums(row));
    float top = dev::fmax(sum.m, ml.x);
    SAW_INT4_UNROLL
    for (int mask = 16; mask >= 1; mask /= 2) top = dev::fmax(top, dev::shfl_xor(top, mask));
    const float keep = piece_weight(sum.m, top), weight = piece_weight(ml.x, top);
    sum.m = top;
    sum.l *= keep;
    SAW_INT4_UNROLL
    for (int i = 0; i < N; ++i) sum.o[i] *= keep;
    const int here = pieces - base < 32 ? pieces - base : 32;
    SAW_INT4_UNROLL_BY(8)
    for (int i = 0; i < here; ++i) {
      const float w = dev::shfl_idx(weight, i);
      sum.l = dev::fma_rn(dev::shfl_idx(ml.y, i), w, sum.l);
      const BlockPiece<D> piece(p, plan, run.slot(run.first_block + base + i));
      SAW_INT4_UNROLL
      for (int e = 0; e < N; e += 4) {
        const float4 o = dev::ld_global_coherent(piece.values(row) + e / 4);
        sum.o[e] = dev::fma_rn(o.x, w, sum.o[e]);
        sum.o[e + 1] = dev::fma_rn(o.y, w, sum.o[e + 1]);
        sum.o[e + 2] = dev::fma_rn(o.z, w, sum.o[e + 2]);
        sum.o[e + 3] = dev::fma_rn(o.w, w, sum.o[e + 3]);
      }
    }
  }
  return sum;
}

}  // namespace saw_int4
