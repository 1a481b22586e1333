// O = softmax(scale * q K^T) V over INT4 rows, for the last query rows of every request, in one launch or two
// (merge_kernel.cuh).
//
// Tokens are the M side of both products: S^T = K q'^T and O^T = V^T P^T, so that 8 query rows (one decode step of a
// GQA group) fill an MMA, and 4 query tokens cost the KV traffic of one. Up to 16 rows of a KV head make a narrow pass
// (narrow.cuh), more, of head_dim 64 and 128, a wide one of 32 (wide.cuh); others make several narrow ones, of 16 rows
// (256, and 64 with two groups) or 8. Both share the pipeline, the walk along the work, and the merge.
//
// Assumes: q, out 16-byte aligned rows of fp16 or bf16; cache base 16-byte aligned; workspace counters zero.
#pragma once

#include <type_traits>

#include "decode/narrow.cuh"
#include "decode/pipeline.cuh"
#include "decode/wide.cuh"

namespace saw_int4 {

template <int D, int NT, int kGroups>
using DecodeState = std::conditional_t<is_wide(NT), WideState<D, NT, kGroups>, NarrowState<D, NT, kGroups>>;

// Whether what is seldom needed waits in shared memory: in wide passes, and in those of two groups where the compiler
// would spill it.
template <int NT, int kGroups>
inline constexpr bool kFewRegisters = is_wide(NT) || (kGroups > 1 && !dev::kMeasuredArch);

// So that the compiler, too, knows that it is the same in all lanes.
SAW_INT4_DEVICE int uniform_warp_id() {
  return dev::shfl_idx(dev::warp_id(), 0);
}

template <int D, int NT, int kGroups>
SAW_INT4_DEVICE WideWarp wide_warp(const DecodePlan& plan, int warp) {
  const uint32_t base = dev::shared_base();
  const int rows = NT * kRowsPerTile;
  WideWarp four;
  four.way = warp % kWideWays;
  four.query = base + plan.query_offset + (warp >> plan.ways_shift) * query_bytes(D, NT);
  four.weights = base + plan.fours_offset + warp / kWideWays * four_warps_bytes(NT, kGroups);
  four.references = four.weights + four_warps_bytes(NT, kGroups) - rows * 4;
  return four;
}

// The tiles of `piece`, pipelined; leaves the block's softmax state in registers and no copy in flight. meanwhile():
// for one thread, while the slots are on their way.
template <int D, int NT, int kGroups, typename Meanwhile>
SAW_INT4_DEVICE void run_tiles(DecodeState<D, NT, kGroups>& s, const DecodeParams& p, const DecodePlan& plan,
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
  int next_slot = has_slot ? fetch_slot(source, first_token(stages) + thread) : kNoSlot;
  const QueryTurns<D, NT> turns{plan.heads_shift, piece.rows.rows};
  RawQuery<D> raw_query = fetch_query(p, piece.rows, piece.kv_head, turns, 0);
  if (thread == dev::thread_count() - 1) meanwhile();
  // What each query row sees. Rows of a pass: 0 .. rows - 1; the padding sees nothing.
  const int first_new = piece.seq_len - piece.q_len;
  const int first_position = first_new + piece.rows.token(0);
  const int last_position = first_new + piece.rows.token(piece.rows.rows - 1);
  const uint32_t scratch = base + plan.scratch_offset;
  const Masks masks{base + plan.rows_offset, scratch + Cursor<NT>::kTreeBaseAt};
  if (thread == 0) dev::st_shared<int32_t>(masks.tree_base, p.tree_mask == nullptr ? 0x7fffffff : first_new);
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
  const uint32_t unmasked_at = scratch + Cursor<NT>::kUnmaskedAt, first_at = scratch + Cursor<NT>::kFirstTokenAt;
  const uint32_t source_at = scratch + Cursor<NT>::kSourceAt;
  if (kFewRegisters<NT, kGroups> && thread == 0) {
    if (is_wide(NT)) {
      dev::st_shared(unmasked_at, int2{unmasked_begin, unmasked_end});
      dev::st_shared<int32_t>(first_at, first_token(0));
    }
    source.keep(source_at);
  }
  const auto kept_source = [&] {
    return kFewRegisters<NT, kGroups> ? TileSource::kept(source_at, token_bytes) : source;
  };

  SAW_INT4_UNROLL
  for (int i = 0; i < kMaxStages; ++i)
    if (has_slot && i < stages)
      dev::st_shared<int32_t>(slots + (i * stage_tokens + thread) * 4, checked_slot(first_slots[i], p.num_slots));
  dev::block_sync();
  SAW_INT4_UNROLL_BY(1)
  for (int i = 0; i < stages - 1; ++i) {
    if (i < used_stages)
      copy_stage(p, plan, source, tokens_in(i), slots + i * stage_tokens * 4, base + i * plan.stage_bytes);
    dev::cp_async_commit();
  }

  SAW_INT4_UNROLL_BY(1)
  for (int turn = 0; turns.has(turn); ++turn) {
    const RawQuery<D> raw = raw_query;
    raw_query = fetch_query(p, piece.rows, piece.kv_head, turns, turn + 1);
    transform_query<kGroups>(p, piece.kv_head, turns, turn, raw, base + plan.query_offset);
  }
  if constexpr (is_wide(NT)) {
    dev::publish_shared();
    const auto four = wide_warp<D, NT, kGroups>(plan, uniform_warp_id());
    if (four.way == 0 && dev::lane_id() < NT * kRowsPerTile) dev::st_shared(four.reference_at(dev::lane_id()), 0.f);
  }
  dev::block_sync();
  const int head = dev::warp_id() / plan.ways, way = dev::warp_id() % plan.ways;
  const uint32_t head_rows = base + inside_chunk + head * kRowBytes;
  NarrowQuery<D, is_wide(NT) ? 1 : NT, kGroups> query;
  if constexpr (!is_wide(NT)) {
    query.shared = base + plan.query_offset + head * query_bytes(D, NT);
    query.load();
  }

  int stage = 0;
  for (int i = 0; i < used_stages; ++i) {
    wait_oldest(stages);
    dev::block_sync();
    const int before = stage == 0 ? stages - 1 : stage - 1;  // the stage that everybody has left
    const int ahead = i + stages - 1;
    // Wide passes request the next stage while they multiply, where chunks have 16 bytes: warps that request all at
    // once stand in their copies, since the memory pipeline takes no more. In narrow ones of head_dim 64 and 128, where
    // another block of the SM computes meanwhile, that was slower.
    const bool spread = is_wide(NT) && plan.chunk_bytes == 16;
    const uint32_t slots_before = slots + before * stage_tokens * 4, stage_before = base + before * plan.stage_bytes;
    if (!spread) {
      if (ahead < used_stages) copy_stage(p, plan, kept_source(), tokens_in(ahead), slots_before, stage_before);
      dev::cp_async_commit();
    }
    const int first = is_wide(NT) ? dev::ld_shared<int32_t>(first_at) + i * stage_tokens : first_token(i);
    if (is_wide(NT) ? next_slot != kNoSlot : has_slot) {
      dev::st_shared<int32_t>(slots + (stage * stage_tokens + thread) * 4, checked_slot(next_slot, p.num_slots));
      next_slot = fetch_slot(kept_source(), first + (stages + 1) * stage_tokens + thread);
    }
    const bool half = kTiles > 1 && i == half_stage;
    constexpr int kTokens = tokens_per_warp(NT, kGroups), kMT = token_tiles(D, NT, kGroups);
    if constexpr (is_wide(NT)) {
      const int warp = uniform_warp_id();  // anew: what follows from it need not be kept
      const auto four = wide_warp<D, NT, kGroups>(plan, warp);
      const auto unmasked = dev::ld_shared<int2>(unmasked_at);
      const uint32_t k_rows = base + inside_chunk + (warp >> plan.ways_shift) * kRowBytes + stage * plan.stage_bytes;
      const uint32_t v_rows = k_rows + plan.stage_bytes / 2;
      // Of the first of the four: its token in the stage.
      const int before_us = ((warp & (plan.ways - 1)) - four.way) * kTokens, skip = before_us * plan.token_stride;
      const int token = first + before_us + four.way * kTokens;
      const bool masked = token + kTokens > unmasked.y || token < unmasked.x;
      const TileSource from = kept_source();
      const StageCopy<16> copy(p, plan, from, warp * 32 + dev::lane_id(),
                               spread && ahead < used_stages ? stage_tokens : 0, slots_before, stage_before);
      attend_together<kMT>(s, four, k_rows + skip, v_rows + skip, plan.token_stride, token, masked, masks, p.logit_cap,
                           copy);
      if (spread) dev::cp_async_commit();
    } else {
      const int mine = half ? kTokens / kTiles : kTokens;
      const int token = first + way * mine;
      const bool masked = token + mine > unmasked_end || token < unmasked_begin;
      const uint32_t k_row = head_rows + stage * plan.stage_bytes + way * mine * plan.token_stride;
      const uint32_t v_row = k_row + plan.stage_bytes / 2;
      if (half) {
        attend<1>(s, query, k_row, v_row, plan.token_stride, token, masked, masks, p.logit_cap);
      } else {
        for (int t = 0; t < kTokens; t += 16 * kMT)
          attend<kMT>(s, query, k_row + t * plan.token_stride, v_row + t * plan.token_stride, plan.token_stride,
                      token + t, masked, masks, p.logit_cap);
      }
    }
    if (++stage == stages) stage = 0;
  }
  dev::cp_async_wait<0>();
}

// The softmax states of the block's warps to finished rows, or to the block's slot of the workspace.
template <int D, int NT, int kGroups>
SAW_INT4_DEVICE void write_piece(const DecodeState<D, NT, kGroups>& s, const DecodeParams& p, const DecodePlan& plan,
                                 const Piece& piece, const Share& share) {
  const uint32_t records = dev::shared_base();
  // One row tile after the other, or, after a wide pass, all at once; a row has a record of each warp, or each four,
  // that share its head.
  constexpr int kTimes = is_wide(NT) ? 1 : NT, kRows = NT * kRowsPerTile / kTimes;
  const int parts = is_wide(NT) ? plan.ways / kWideWays : plan.ways;
  SAW_INT4_UNROLL
  for (int nt = 0; nt < kTimes; ++nt) {
    const int left = piece.rows.rows - nt * kRows, used = left < kRows ? left : kRows;
    dev::block_sync();  // the stages, or the row tile before, are no longer read
    if constexpr (is_wide(NT))
      store_records(s, wide_warp<D, NT, kGroups>(plan, uniform_warp_id()), used, records);
    else
      store_records(s, nt, used, records);
    dev::block_sync();
    for (int i = dev::warp_id(); i < used << plan.heads_shift; i += plan.warps) {
      const int head = i & (plan.heads_per_block - 1), row = i >> plan.heads_shift;
      const int index = i + (nt * kRows << plan.heads_shift);
      RowPiece<D> sum = sum_shared_records<D>(records + (head * parts * kRows + row) * Record<D>::kBytes,
                                              kRows * Record<D>::kBytes, parts);
      if (share.pieces == 1) {
        finish_row<D>(p, plan, piece.rows, piece.kv_head, sum, index);
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
  SAW_INT4_UNROLL_BY(1)
  for (int row = dev::warp_id() >> shift; row < rows; row += plan.warps >> shift) {
    RowPiece<D> sum = PiecesOfWarp<D>(p, plan, share, row, way, ways).sum(mine);
    if (ways == 1)
      finish_row<D>(p, plan, piece.rows, piece.kv_head, sum, row);
    else
      store_record(sum, [&](int byte, const float4& x) { dev::st_shared(record + byte, x); });
  }
  if (ways == 1) return;
  dev::block_sync();
  const int row = dev::warp_id() >> shift;
  if (way != 0 || row >= rows) return;
  RowPiece<D> sum = sum_shared_records<D>(record, Record<D>::kBytes, ways);
  finish_row<D>(p, plan, piece.rows, piece.kv_head, sum, row);
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
    const auto before = static_cast<int32_t>(dev::atomic_add_acq_rel_u32(counter, 1));
    if (before + 1 == pieces) dev::st_global(counter, 0u);  // for the next launch
    dev::st_shared(scratch, before);
  }
  dev::block_sync();
  return dev::ld_shared<int32_t>(scratch) + 1 == pieces;
}

template <int D, int NT, int kGroups>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(32 * max_warps(NT, kGroups, dev::kLargeShared),
                                       NT == 1 || dev::kMeasuredArch ? blocks_by_registers(D, NT, kGroups) : 1)
    saw_int4_decode_kernel(const DecodeParams p, const DecodePlan plan) {
  const uint32_t scratch = dev::shared_base() + plan.scratch_offset;
  const Cursor<NT> cursor(scratch);
  if (plan.merge_launch) dev::let_dependents_start();
  Piece piece = cursor.start(p, plan);
  while (piece.exists()) {
    DecodeState<D, NT, kGroups> state;
    run_tiles<D, NT, kGroups>(state, p, plan, piece, [&] {
      const Share share = cursor.share(plan, piece);
      cursor.keep_share(share);
      if (kFewRegisters<NT, kGroups>) cursor.keep_rows(piece);
      if (share.pieces > 1) dev::prefetch_l2(run_counter(p, piece));
    });
    const Share share = cursor.kept_share();
    if (kFewRegisters<NT, kGroups>) cursor.recall_rows(piece);
    write_piece<D, NT, kGroups>(state, p, plan, piece, share);
    if (share.pieces > 1 && !plan.merge_launch &&
        arrives_last(run_counter(p, piece), share.pieces, scratch + cursor.kArrivedAt))
      merge_run<D>(p, plan, piece, share);
    piece = cursor.next(p, plan);
  }
}

}  // namespace saw_int4
