// A block's walk along its stretch of units (schedule.h). One thread walks and leaves each piece in shared memory,
// where it costs no registers while the tiles run.
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
  int table_row, seq_len, q_len;  // of the request
  QueryRows rows;
  int kv_head;  // first of the block's
  int tile_begin, tile_end;
  int pieces, index;          // of the run, and which this one is
  int first_slot, next_slot;  // of the workspace: where the run's piece 0 lies, and where the others count from
  int slot_step;

  SAW_INT4_DEVICE int slot(int i) const { return i == 0 ? first_slot : next_slot + i * slot_step; }
};

// What the walk reads of a request, in one trip to memory.
struct Request {
  int seq_len = 0, q_len = 0, first_token = 0, table_row = 0;
};

SAW_INT4_DEVICE Request fetch_request(const DecodeParams& p, int b) {
  Request r;
  if (b >= p.num_requests) return r;
  r.seq_len = static_cast<int>(dev::ld_global(p.seq_lens + b));
  r.table_row = static_cast<int>(dev::ld_global(p.table_rows + b));
  r.first_token = p.q_indptr == nullptr ? b * p.max_q_len : dev::ld_global(p.q_indptr + b);
  r.q_len = p.q_indptr == nullptr ? p.max_q_len : dev::ld_global(p.q_indptr + b + 1) - r.first_token;
  return r;
}

template <int NT>
class Cursor {
 public:
  static constexpr int kFreeAt = 96;  // of the scratch: 16 bytes for the block's own use
  // scratch: kDecodeScratchBytes of shared memory, 16-byte aligned.
  SAW_INT4_DEVICE explicit Cursor(uint32_t scratch) : scratch_(scratch) {}

  // Leaves the block's first piece in shared memory. All threads; a barrier must follow before anyone looks.
  SAW_INT4_DEVICE void start(const DecodeParams& p, const DecodePlan& plan) const {
    if (dev::warp_id() != 0) return;
    // Each lane counts a few neighbouring requests; whoever counts the block's first unit goes on from there.
    const int lane = dev::lane_id(), each = (p.num_requests + 31) / 32;
    const Request first = fetch_request(p, lane * each);
    int units = units_of(plan, p.window, first);
    SAW_INT4_UNROLL_BY(4)
    for (int i = 1; i < each; ++i) units += units_of(plan, p.window, fetch_request(p, lane * each + i));
    int end = units;
    SAW_INT4_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = dev::shfl_up(end, delta);
      if (lane >= delta) end += below;
    }
    const int total = dev::shfl_idx(end, 31);
    const Stretches stretches = cut(total, dev::block_count() >> plan.column_shift);
    const int unit = stretches.begin(place(plan).number), before = end - units;
    if (unit >= total) {
      if (lane == 0) dev::st_shared<int32_t>(scratch_ + kPieceAt, kNoPiece);
    } else if (unit >= before && unit < end) {
      const int stop = unit + stretches.units < total ? unit + stretches.units : total;
      write_piece(p, plan, stretches, unit, stop, before, lane * each, first);
    }
  }

  // Leaves the next piece in shared memory. All threads; a barrier must lie before and follow.
  SAW_INT4_DEVICE void next(const DecodeParams& p, const DecodePlan& plan) const {
    if (dev::thread_index() != 0) return;
    const auto walk = dev::ld_shared<uint4>(scratch_);
    const Stretches stretches{dev::ld_shared<int32_t>(scratch_ + 16)};
    const int unit = static_cast<int>(walk.x), stop = static_cast<int>(walk.y), b = static_cast<int>(walk.w);
    if (unit >= stop)
      dev::st_shared<int32_t>(scratch_ + kPieceAt, kNoPiece);
    else
      write_piece(p, plan, stretches, unit, stop, static_cast<int>(walk.z), b, fetch_request(p, b));
  }

  SAW_INT4_DEVICE bool has_piece() const { return dev::ld_shared<int32_t>(scratch_ + kPieceAt) != kNoPiece; }

  SAW_INT4_DEVICE Piece piece(const DecodePlan& plan) const {
    const auto a = dev::ld_shared<uint4>(scratch_ + kPieceAt), b = dev::ld_shared<uint4>(scratch_ + kPieceAt + 16);
    const auto c = dev::ld_shared<uint4>(scratch_ + kPieceAt + 32);
    const auto d = dev::ld_shared<uint2>(scratch_ + kPieceAt + 48);
    const auto i = [](uint32_t x) { return static_cast<int>(x); };
    return {i(a.x), i(a.y), i(a.z), {i(a.w), i(b.x), i(b.y), plan.group, plan.group_magic},
            i(b.z), i(b.w), i(c.x), i(c.y),
            i(c.z), i(c.w), i(d.x), i(d.y)};
  }

 private:
  static constexpr int kPieceAt = 32, kNoPiece = -1;  // no request has this table row
  static_assert(kPieceAt + 56 <= kFreeAt && kFreeAt + 16 <= kDecodeScratchBytes);
  uint32_t scratch_;

  static SAW_INT4_DEVICE int units_of(const DecodePlan& plan, int64_t window, const Request& r) {
    return request_units(r.seq_len, r.q_len, window, plan.tile_shift, plan.max_pieces, plan.group, kRowsPerTile * NT,
                         plan.head_groups >> plan.column_shift);
  }
  static SAW_INT4_DEVICE BlockPlace place(const DecodePlan& plan) {
    return block_place(dev::block_index(), plan.column_shift);
  }

  // The piece that begins at `unit` and ends with its run or at `stop`, to shared memory, and where the walk goes on.
  // before: units before request b; the unit lies in it or in a later one.
  SAW_INT4_DEVICE void write_piece(const DecodeParams& p, const DecodePlan& plan, const Stretches& stretches, int unit,
                                   int stop, int before, int b, Request r) const {
    SAW_INT4_UNROLL_BY(1)
    for (int n = units_of(plan, p.window, r); unit >= before + n; n = units_of(plan, p.window, r)) {
      before += n;
      r = fetch_request(p, ++b);
    }
    const TileRange range = tile_range(r.seq_len, r.q_len, p.window, plan.tile_shift);
    const int passes = row_passes(r.q_len, plan.group, kRowsPerTile * NT);
    const RunUnits units = run_units(range.tiles, plan.max_pieces);
    const BlockPlace here = place(plan);
    const int run = (unit - before) / units.units, heads = passes == 1 ? run : run / passes;
    const int first_row = (run - heads * passes) * kRowsPerTile * NT, left = r.q_len * plan.group - first_row;
    const int run_begin = before + run * units.units, run_end = run_begin + units.units;
    int end = stop < run_end ? stop : run_end, pieces = 0, index = 0, first_slot = run_begin, next_slot = run_begin;
    if (plan.max_pieces == 0) {
      const int first_block = stretches.block_of(run_begin);
      pieces = stretches.block_of(run_end - 1) - first_block + 1;
      index = here.number - first_block;
      first_slot = stretches.slot(run_begin, first_block);
      next_slot = 2 * first_block;  // other blocks meet the run at the start of their stretches
    } else {
      end = unit + 1;
      pieces = units.units;
      index = unit - run_begin;
    }
    const int begin_tile = (unit - run_begin) * units.tiles_per_unit,
              end_tile = (end - run_begin) * units.tiles_per_unit;
    const auto u = [](int x) { return static_cast<uint32_t>(x); };
    const uint32_t at = scratch_ + kPieceAt;
    dev::st_shared(at, uint4{u(r.table_row), u(r.seq_len), u(r.q_len), u(r.first_token)});
    dev::st_shared(at + 16, uint4{u(first_row), u(left < kRowsPerTile * NT ? left : kRowsPerTile * NT),
                                  u(here.head_group(heads) * plan.heads_per_block), u(range.first_tile + begin_tile)});
    dev::st_shared(at + 32, uint4{u(range.first_tile + (end_tile < range.tiles ? end_tile : range.tiles)), u(pieces),
                                  u(index), u(here.slot(first_slot))});
    dev::st_shared(at + 48, uint2{u(here.slot(next_slot)), u((plan.max_pieces == 0 ? 2 : 1) << plan.column_shift)});
    dev::st_shared(scratch_, uint4{u(end), u(stop), u(before), u(b)});
    dev::st_shared<int32_t>(scratch_ + 16, stretches.units);
  }
};

}  // namespace saw_int4
