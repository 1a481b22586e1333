// A block's walk along its stretch of units (schedule.h). Thread 0 walks and leaves each piece in shared memory, where
// it costs no registers while the tiles run.
#pragma once

#include "common/device.h"
#include "decode/config.h"
#include "decode/schedule.h"

namespace saw_int4 {

// The order in which the query rows of a KV head are counted: row = token * group + head of the group.
struct QueryRows {
  int first_token;  // of the request, in q
  int first_row;    // of this pass
  int rows;         // of this pass
  int group;
  SAW_INT4_DEVICE int token(int row) const { return (first_row + row) / group; }  // of the request
  SAW_INT4_DEVICE int head(int row) const { return (first_row + row) % group; }   // of the group
};

// Stretch of tiles of one run that this block works on.
struct Piece {
  int request, seq_len, q_len;
  QueryRows rows;
  int kv_head;  // first of the block's
  int tile_begin, tile_end;
  int first_block, last_block;  // that share the run; equal when the piece is all of it
  int first_slot;               // of the workspace, where first_block writes

  // Any other block meets the run at the start of its stretch.
  SAW_INT4_DEVICE int slot(int block) const { return block == first_block ? first_slot : 2 * block; }
};

SAW_INT4_DEVICE int query_len(const DecodeParams& p, int b) {
  return p.q_indptr == nullptr ? p.max_q_len : dev::ld_global(p.q_indptr + b + 1) - dev::ld_global(p.q_indptr + b);
}

SAW_INT4_DEVICE int64_t units_of(const DecodeParams& p, const DecodePlan& plan, int b) {
  if (b >= p.num_requests) return 0;
  return request_units(dev::ld_global(p.seq_lens + b), query_len(p, b), p.window, plan.tile_tokens,
                       p.num_q_heads / p.num_kv_heads, kRowsPerTile * plan.row_tiles, plan.head_groups);
}

// Inclusive sum over the threads of the block, and the block's total. scratch: 8 bytes per warp.
SAW_INT4_DEVICE int64_t block_scan(int64_t value, uint32_t scratch, int64_t& total) {
  const int lane = dev::lane_id(), warps = dev::thread_count() / 32;
  SAW_INT4_UNROLL
  for (int delta = 1; delta < 32; delta *= 2) {
    const int64_t below = dev::shfl_up(value, delta);
    if (lane >= delta) value += below;
  }
  if (lane == 31) dev::st_shared<int64_t>(scratch + 8 * dev::warp_id(), value);
  dev::block_sync();
  total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == dev::warp_id()) value += total;
    total += dev::ld_shared<int64_t>(scratch + 8 * w);
  }
  dev::block_sync();
  return value;
}

class Cursor {
 public:
  // scratch: kDecodeScratchBytes of shared memory, 16-byte aligned.
  SAW_INT4_DEVICE explicit Cursor(uint32_t scratch) : scratch_(scratch) {}

  // Finds the request that holds the block's first unit. All threads. False when there is nothing to do for it.
  SAW_INT4_DEVICE bool start(const DecodeParams& p, const DecodePlan& plan) const {
    const int threads = dev::thread_count();
    const int64_t first = units_of(p, plan, dev::thread_index());
    int64_t rest = 0, first_total = 0, rest_total = 0;
    const int64_t first_end = block_scan(first, scratch_, first_total);
    if (p.num_requests > threads) {
      for (int b = threads + dev::thread_index(); b < p.num_requests; b += threads) rest += units_of(p, plan, b);
      block_scan(rest, scratch_, rest_total);
    }
    const int64_t total = first_total + rest_total;
    const int blocks = working_blocks(total, dev::block_count());
    if (dev::block_index() >= blocks) return false;
    const int64_t begin = block_begin(total, dev::block_index(), blocks);
    if (begin >= first_end - first && begin < first_end) save(total, begin, first_end - first, dev::thread_index());
    int64_t before = first_total;
    for (int base = threads; before <= begin; base += threads) {
      const int b = base + dev::thread_index();
      const int64_t units = units_of(p, plan, b);
      int64_t chunk = 0;
      const int64_t end = before + block_scan(units, scratch_, chunk);
      if (begin >= end - units && begin < end) save(total, begin, end - units, b);
      before += chunk;
    }
    return true;
  }

  // Leaves the next piece in shared memory. All threads; false when the stretch is done.
  SAW_INT4_DEVICE bool next(const DecodeParams& p, const DecodePlan& plan) const {
    dev::block_sync();
    if (dev::thread_index() == 0) advance(p, plan);
    dev::block_sync();
    return dev::ld_shared<int32_t>(scratch_ + kPieceAt) >= 0;
  }

  SAW_INT4_DEVICE Piece piece(const DecodeParams& p) const {
    const auto a = dev::ld_shared<uint4>(scratch_ + kPieceAt), b = dev::ld_shared<uint4>(scratch_ + kPieceAt + 16);
    const auto c = dev::ld_shared<uint4>(scratch_ + kPieceAt + 32);
    const auto i = [](uint32_t x) { return static_cast<int>(x); };
    return {i(a.x), i(a.y), i(a.z), {i(a.w), i(b.x), i(b.y), p.num_q_heads / p.num_kv_heads}, i(b.z), i(b.w), i(c.x),
            i(c.y), i(c.z), i(c.w)};
  }

 private:
  static constexpr int kTotalAt = 64, kUnitAt = 72, kBeforeAt = 80, kRequestAt = 88, kPieceAt = 96;
  static_assert(kPieceAt + 48 <= kDecodeScratchBytes);
  uint32_t scratch_;

  // Units in all, the next unit of this block, the units before its request, and the request.
  SAW_INT4_DEVICE void save(int64_t total, int64_t unit, int64_t before, int request) const {
    dev::st_shared<int64_t>(scratch_ + kTotalAt, total);
    dev::st_shared<int64_t>(scratch_ + kUnitAt, unit);
    dev::st_shared<int64_t>(scratch_ + kBeforeAt, before);
    dev::st_shared<int32_t>(scratch_ + kRequestAt, request);
  }

  SAW_INT4_DEVICE void advance(const DecodeParams& p, const DecodePlan& plan) const {
    const auto total = dev::ld_shared<int64_t>(scratch_ + kTotalAt), unit = dev::ld_shared<int64_t>(scratch_ + kUnitAt);
    auto before = dev::ld_shared<int64_t>(scratch_ + kBeforeAt);
    int b = dev::ld_shared<int32_t>(scratch_ + kRequestAt);
    const int block = dev::block_index(), blocks = working_blocks(total, dev::block_count());
    const int64_t end = block_begin(total, block + 1, blocks);
    if (unit >= end) {
      dev::st_shared<int32_t>(scratch_ + kPieceAt, -1);
      return;
    }
    for (int64_t units = units_of(p, plan, b); unit >= before + units; units = units_of(p, plan, b)) {
      before += units;
      ++b;
    }
    const int group = p.num_q_heads / p.num_kv_heads, rows_per_pass = kRowsPerTile * plan.row_tiles;
    const auto seq_len = static_cast<int>(dev::ld_global(p.seq_lens + b));
    const int q_len = query_len(p, b);
    const int first_token = p.q_indptr == nullptr ? b * p.max_q_len : dev::ld_global(p.q_indptr + b);
    const TileRange range = tile_range(seq_len, q_len, p.window, plan.tile_tokens);
    const int passes = row_passes(q_len, group, rows_per_pass);
    const int run = static_cast<int>((unit - before) / range.tiles);
    const int first_row = run % passes * rows_per_pass, left = q_len * group - first_row;
    const int64_t run_begin = before + static_cast<int64_t>(run) * range.tiles, run_end = run_begin + range.tiles;
    const int64_t stop = end < run_end ? end : run_end;
    const int first_block = block_of_unit(total, run_begin, blocks);
    const auto u = [](int64_t x) { return static_cast<uint32_t>(x); };
    dev::st_shared(scratch_ + kPieceAt, uint4{u(b), u(seq_len), u(q_len), u(first_token)});
    dev::st_shared(scratch_ + kPieceAt + 16,
                   uint4{u(first_row), u(left < rows_per_pass ? left : rows_per_pass),
                         u(run / passes * plan.heads_per_block), u(range.first_tile + unit - run_begin)});
    dev::st_shared(scratch_ + kPieceAt + 32, uint4{u(range.first_tile + stop - run_begin), u(first_block),
                                                   u(block_of_unit(total, run_end - 1, blocks)),
                                                   u(piece_slot(total, run_begin, first_block, blocks))});
    save(total, stop, before, b);
  }
};

}  // namespace saw_int4
