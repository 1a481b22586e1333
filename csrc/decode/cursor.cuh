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
  uint32_t group_magic;
  SAW_INT4_DEVICE int token(int row) const {  // of the request
    return group == 1 ? first_row + row : static_cast<int>(dev::mul_hi(first_row + row, group_magic));
  }
  SAW_INT4_DEVICE int head(int row) const { return first_row + row - token(row) * group; }  // of the group
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

template <int NT>
SAW_INT4_DEVICE int units_of(const DecodeParams& p, const DecodePlan& plan, int b) {
  if (b >= p.num_requests) return 0;
  return request_units(static_cast<int>(dev::ld_global(p.seq_lens + b)), query_len(p, b), p.window, plan.tile_shift,
                       plan.group, kRowsPerTile * NT, plan.head_groups);
}

// Inclusive sum over the threads of the block, and the block's total. scratch: 4 bytes per warp.
SAW_INT4_DEVICE int block_scan(int value, uint32_t scratch, int& total) {
  const int lane = dev::lane_id(), warps = dev::thread_count() / 32;
  SAW_INT4_UNROLL
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = dev::shfl_up(value, delta);
    if (lane >= delta) value += below;
  }
  if (lane == 31) dev::st_shared<int32_t>(scratch + 4 * dev::warp_id(), value);
  dev::block_sync();
  total = 0;
  SAW_INT4_UNROLL_BY(1)
  for (int w = 0; w < warps; ++w) {
    if (w == dev::warp_id()) value += total;
    total += dev::ld_shared<int32_t>(scratch + 4 * w);
  }
  dev::block_sync();
  return value;
}

template <int NT>
class Cursor {
 public:
  // scratch: kDecodeScratchBytes of shared memory, 16-byte aligned.
  SAW_INT4_DEVICE explicit Cursor(uint32_t scratch) : scratch_(scratch) {}

  // Finds the request that holds the block's first unit. All threads. False when there is nothing to do for it.
  SAW_INT4_DEVICE bool start(const DecodeParams& p, const DecodePlan& plan) const {
    const int threads = dev::thread_count();
    int total = 0;
    // Mostly one round each: the sum, then the place.
    SAW_INT4_UNROLL_BY(1)
    for (int base = 0; base < p.num_requests; base += threads) {
      int chunk = 0;
      block_scan(units_of<NT>(p, plan, base + dev::thread_index()), scratch_, chunk);
      total += chunk;
    }
    const Stretches stretches(total, dev::block_count());
    if (dev::block_index() >= stretches.blocks) return false;
    const int begin = stretches.begin(dev::block_index());
    SAW_INT4_UNROLL_BY(1)
    for (int base = 0, before = 0; before <= begin; base += threads) {
      const int b = base + dev::thread_index(), units = units_of<NT>(p, plan, b);
      int chunk = 0;
      const int end = before + block_scan(units, scratch_, chunk);
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

  SAW_INT4_DEVICE Piece piece(const DecodePlan& plan) const {
    const auto a = dev::ld_shared<uint4>(scratch_ + kPieceAt), b = dev::ld_shared<uint4>(scratch_ + kPieceAt + 16);
    const auto c = dev::ld_shared<uint4>(scratch_ + kPieceAt + 32);
    const auto i = [](uint32_t x) { return static_cast<int>(x); };
    return {i(a.x), i(a.y), i(a.z), {i(a.w), i(b.x), i(b.y), plan.group, plan.group_magic}, i(b.z), i(b.w), i(c.x),
            i(c.y), i(c.z), i(c.w)};
  }

 private:
  static constexpr int kWalkAt = 32, kPieceAt = 48;
  static_assert(kPieceAt + 48 <= kDecodeScratchBytes && 4 * kMaxWarps <= kWalkAt);
  uint32_t scratch_;

  // Units in all, the next unit of this block, the units before its request, and the request.
  SAW_INT4_DEVICE void save(int total, int unit, int before, int request) const {
    const auto u = [](int x) { return static_cast<uint32_t>(x); };
    dev::st_shared(scratch_ + kWalkAt, uint4{u(total), u(unit), u(before), u(request)});
  }

  SAW_INT4_DEVICE void advance(const DecodeParams& p, const DecodePlan& plan) const {
    const auto walk = dev::ld_shared<uint4>(scratch_ + kWalkAt);
    const int unit = static_cast<int>(walk.y);
    int before = static_cast<int>(walk.z), b = static_cast<int>(walk.w);
    const Stretches stretches(static_cast<int>(walk.x), dev::block_count());
    const int end = stretches.begin(dev::block_index() + 1);
    if (unit >= end) {
      dev::st_shared<int32_t>(scratch_ + kPieceAt, -1);
      return;
    }
    int seq_len = 0, q_len = 0, passes = 0;
    TileRange range{0, 0};
    SAW_INT4_UNROLL_BY(1)
    for (;; ++b) {  // to the request that holds the unit; those without query rows hold none
      seq_len = static_cast<int>(dev::ld_global(p.seq_lens + b));
      q_len = query_len(p, b);
      range = tile_range(seq_len, q_len, p.window, plan.tile_shift);
      passes = row_passes(q_len, plan.group, kRowsPerTile * NT);
      const int units = range.tiles * passes * plan.head_groups;
      if (unit < before + units) break;
      before += units;
    }
    const int first_token = p.q_indptr == nullptr ? b * p.max_q_len : dev::ld_global(p.q_indptr + b);
    const int run = (unit - before) / range.tiles, head_group = run / passes;
    const int first_row = (run - head_group * passes) * kRowsPerTile * NT, left = q_len * plan.group - first_row;
    const int run_begin = before + run * range.tiles, run_end = run_begin + range.tiles;
    const int stop = end < run_end ? end : run_end;
    const int first_block = stretches.block_of(run_begin);
    const auto u = [](int x) { return static_cast<uint32_t>(x); };
    dev::st_shared(scratch_ + kPieceAt, uint4{u(b), u(seq_len), u(q_len), u(first_token)});
    dev::st_shared(scratch_ + kPieceAt + 16,
                   uint4{u(first_row), u(left < kRowsPerTile * NT ? left : kRowsPerTile * NT),
                         u(head_group * plan.heads_per_block), u(range.first_tile + unit - run_begin)});
    dev::st_shared(scratch_ + kPieceAt + 32,
                   uint4{u(range.first_tile + stop - run_begin), u(first_block), u(stretches.block_of(run_end - 1)),
                         u(stretches.slot(run_begin, first_block))});
    save(static_cast<int>(walk.x), stop, before, b);
  }
};

}  // namespace saw_int4
