// A block's walk along its stretch of units (schedule.h). Every warp walks for itself: what one found would reach the
// others through shared memory and a barrier, half a microsecond later. Between two pieces the place lies in shared
// memory, where it costs no registers while the tiles run.
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

// How the blocks that have pieces of one run share it.
struct Share {
  int pieces, index;          // of the run, and which this block's is
  int first_slot, next_slot;  // of the workspace: where the run's piece 0 lies, and where the others count from
  int slot_step;

  SAW_INT4_DEVICE int slot(int i) const { return i == 0 ? first_slot : next_slot + i * slot_step; }
};

// Stretch of tiles of one run that this block works on.
struct Piece {
  int table_row = kNone, seq_len, q_len;  // of the request
  QueryRows rows;
  int kv_head;  // first of the block's
  int tile_begin, tile_end;
  int unit, run_begin, run_units;  // of the column's line: the piece's first, the run's first, and how many it has
  int units_of_block;

  SAW_INT4_DEVICE bool exists() const { return table_row != kNone; }

 private:
  static constexpr int kNone = -1;  // no request has this table row
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

// Units of a request in a column. rows_per_pass: of the kernel, a constant where it is compiled for one.
SAW_INT4_DEVICE int units_of(const DecodePlan& plan, int64_t window, int rows_per_pass, const Request& r) {
  return request_units(r.seq_len, r.q_len, window, plan.tile_shift, plan.max_pieces, plan.group, rows_per_pass,
                       plan.head_groups >> plan.column_shift);
}

// A request in its column's line of units: its number, and the units before it.
struct LinePlace {
  Request request;
  int b, before;
};

// The requests as a warp counts them: each lane a few neighbours, of which `first` is the first.
struct Line {
  Request first;
  int each, lanes;
  int units, end;  // of the lane's requests; of them and all before them
  int total;

  SAW_INT4_DEVICE Line(const DecodeParams& p, const DecodePlan& plan, int rows_per_pass) {
    const int lane = dev::lane_id();
    each = (p.num_requests + 31) / 32;
    lanes = each == 1 ? p.num_requests : 32;
    first = fetch_request(p, lane * each);
    units = units_of(plan, p.window, rows_per_pass, first);
    SAW_INT4_UNROLL_BY(4)
    for (int i = 1; i < each; ++i) units += units_of(plan, p.window, rows_per_pass, fetch_request(p, lane * each + i));
    end = units;
    SAW_INT4_UNROLL_BY(1)
    for (int delta = 1; delta < lanes; delta *= 2) {
      const int below = dev::shfl_up(end, delta);
      if (lane >= delta) end += below;
    }
    total = dev::shfl_idx(end, lanes - 1);
  }

  // The first request of a lane, told to all.
  SAW_INT4_DEVICE LinePlace first_of(int lane) const {
    const int before = dev::shfl_idx(end - units, lane);
    const Request r{dev::shfl_idx(first.seq_len, lane), dev::shfl_idx(first.q_len, lane),
                    dev::shfl_idx(first.first_token, lane), dev::shfl_idx(first.table_row, lane)};
    return {r, lane * each, before};
  }
  // The first request of the lane that counted a unit.
  SAW_INT4_DEVICE LinePlace near_unit(int unit) const {
    return first_of(dev::count_lanes(dev::lane_id() < lanes && end <= unit));
  }
};

// Goes on to the request that has a unit.
SAW_INT4_DEVICE void walk_to_unit(const DecodeParams& p, const DecodePlan& plan, int rows_per_pass, int unit,
                                  LinePlace& at) {
  SAW_INT4_UNROLL_BY(1)
  for (int n = units_of(plan, p.window, rows_per_pass, at.request); unit >= at.before + n;
       n = units_of(plan, p.window, rows_per_pass, at.request)) {
    at.before += n;
    at.request = fetch_request(p, ++at.b);
  }
}

// Query rows and heads of number `run` of a request's runs in a column.
struct RunRows {
  QueryRows rows;
  int kv_head;  // the first
};
SAW_INT4_DEVICE RunRows run_rows(const DecodePlan& plan, int rows_per_pass, const BlockPlace& place, const Request& r,
                                 int run) {
  const int passes = row_passes(r.q_len, plan.group, rows_per_pass), heads = passes == 1 ? run : run / passes;
  const int first_row = (run - heads * passes) * rows_per_pass, left = r.q_len * plan.group - first_row;
  return {{r.first_token, first_row, left < rows_per_pass ? left : rows_per_pass, plan.group, plan.group_magic},
          place.head_group(heads) * plan.heads_per_block};
}

// How the blocks of a column share a run.
SAW_INT4_DEVICE Share share_run(const DecodePlan& plan, const BlockPlace& place, const Stretches& stretches,
                                int run_begin, int run_units, int unit) {
  if (plan.max_pieces > 0)
    return {run_units, unit - run_begin, place.slot(run_begin), place.slot(run_begin), 1 << plan.column_shift};
  const int first_block = stretches.block_of(run_begin);
  // Other blocks meet the run at the start of their stretches.
  return {stretches.block_of(run_begin + run_units - 1) - first_block + 1, place.number - first_block,
          place.slot(stretches.slot(run_begin, first_block)), place.slot(2 * first_block), 2 << plan.column_shift};
}

template <int NT>
class Cursor {
 public:
  // Where in the scratch lies what the block keeps beside the walk.
  static constexpr int kUnmaskedAt = 64;          // the piece's tokens that all its rows see: begin, end
  static constexpr int kTreeBaseAt = 72;          // Masks::tree_base
  static constexpr int kFirstTokenAt = 76;        // of the piece's tiles
  static constexpr int kSourceAt = 96;            // TileSource
  static constexpr int kArrivedAt = kUnmaskedAt;  // once the tiles are done: pieces of the run counted before

  // scratch: kDecodeScratchBytes of shared memory, 16-byte aligned.
  SAW_INT4_DEVICE explicit Cursor(uint32_t scratch) : scratch_(scratch) {}

  // The block's first piece, if it has any.
  SAW_INT4_DEVICE Piece start(const DecodeParams& p, const DecodePlan& plan) const {
    const Line line(p, plan, kRowsPerPass);
    const Stretches stretches = cut(line.total, dev::block_count() >> plan.column_shift, tiles_per_stage(NT));
    const int unit = stretches.begin(place(plan).number);
    if (unit >= line.total) return {};
    const int stop = unit + stretches.units < line.total ? unit + stretches.units : line.total;
    return piece_at(p, plan, stretches, unit, stop, line.near_unit(unit));
  }

  // The next piece, if there is one. A barrier: what the block had in shared memory is no longer needed.
  SAW_INT4_DEVICE Piece next(const DecodeParams& p, const DecodePlan& plan) const {
    const auto walk = dev::ld_shared<uint4>(scratch_);
    const Stretches stretches{dev::ld_shared<int32_t>(scratch_ + 16)};
    dev::block_sync();
    const int unit = static_cast<int>(walk.x), stop = static_cast<int>(walk.y), b = static_cast<int>(walk.w);
    if (unit >= stop) return {};
    return piece_at(p, plan, stretches, unit, stop, {fetch_request(p, b), b, static_cast<int>(walk.z)});
  }

  // What is needed only when the piece is done; two divisions. Waits in shared memory, after a barrier, until then.
  SAW_INT4_DEVICE void keep_share(const Share& share) const {
    const auto u = [](int x) { return static_cast<uint32_t>(x); };
    dev::st_shared(scratch_ + kShareAt,
                   uint4{u(share.pieces), u(share.index), u(share.first_slot), u(share.next_slot)});
    dev::st_shared<int32_t>(scratch_ + kShareAt + 16, share.slot_step);
  }
  SAW_INT4_DEVICE Share kept_share() const {
    const auto a = dev::ld_shared<uint4>(scratch_ + kShareAt);
    const auto i = [](uint32_t x) { return static_cast<int>(x); };
    return {i(a.x), i(a.y), i(a.z), i(a.w), dev::ld_shared<int32_t>(scratch_ + kShareAt + 16)};
  }
  // The same for where a piece's rows go: for kernels that have no registers to keep it in.
  SAW_INT4_DEVICE void keep_rows(const Piece& piece) const {
    const auto u = [](int x) { return static_cast<uint32_t>(x); };
    dev::st_shared(scratch_ + kRowsAt,
                   uint4{u(piece.rows.first_token), u(piece.rows.first_row), u(piece.rows.rows), u(piece.kv_head)});
  }
  SAW_INT4_DEVICE void recall_rows(Piece& piece) const {
    const auto kept = dev::ld_shared<uint4>(scratch_ + kRowsAt);
    piece.rows.first_token = static_cast<int>(kept.x);
    piece.rows.first_row = static_cast<int>(kept.y);
    piece.rows.rows = static_cast<int>(kept.z);
    piece.kv_head = static_cast<int>(kept.w);
  }
  static SAW_INT4_DEVICE Share share(const DecodePlan& plan, const Piece& piece) {
    return share_run(plan, place(plan), {piece.units_of_block}, piece.run_begin, piece.run_units, piece.unit);
  }

 private:
  static constexpr int kShareAt = 32;
  static constexpr int kRowsAt = 80;
  static_assert(kShareAt + 20 <= kUnmaskedAt && kFirstTokenAt + 4 <= kRowsAt && kRowsAt + 16 <= kSourceAt &&
                kSourceAt + 16 <= kDecodeScratchBytes);
  static constexpr int kRowsPerPass = kRowsPerTile * NT;
  uint32_t scratch_;

  static SAW_INT4_DEVICE BlockPlace place(const DecodePlan& plan) {
    return block_place(dev::block_index(), plan.column_shift);
  }

  // The piece that begins at `unit` and ends with its run or at `stop`; where the walk goes on, to shared memory.
  // at: the place of the unit's request, or of one before it.
  SAW_INT4_DEVICE Piece piece_at(const DecodeParams& p, const DecodePlan& plan, const Stretches& stretches, int unit,
                                 int stop, LinePlace at) const {
    walk_to_unit(p, plan, kRowsPerPass, unit, at);
    const Request& r = at.request;
    const TileRange range = tile_range(r.seq_len, r.q_len, p.window, plan.tile_shift);
    const RunUnits units = run_units(range.tiles, plan.max_pieces);
    const int run = (unit - at.before) / units.units;
    const RunRows rows = run_rows(plan, kRowsPerPass, place(plan), r, run);
    const int run_begin = at.before + run * units.units, run_end = run_begin + units.units;
    const int end = plan.max_pieces > 0 ? unit + 1 : stop < run_end ? stop : run_end;
    const int begin_tile = (unit - run_begin) * units.tiles_per_unit,
              end_tile = (end - run_begin) * units.tiles_per_unit;
    if (dev::thread_index() == 0) {
      const auto u = [](int x) { return static_cast<uint32_t>(x); };
      dev::st_shared(scratch_, uint4{u(end), u(stop), u(at.before), u(at.b)});
      dev::st_shared<int32_t>(scratch_ + 16, stretches.units);
    }
    Piece piece;
    piece.table_row = r.table_row;
    piece.seq_len = r.seq_len;
    piece.q_len = r.q_len;
    piece.rows = rows.rows;
    piece.kv_head = rows.kv_head;
    piece.tile_begin = range.first_tile + begin_tile;
    piece.tile_end = range.first_tile + (end_tile < range.tiles ? end_tile : range.tiles);
    piece.unit = unit;
    piece.run_begin = run_begin;
    piece.run_units = units.units;
    piece.units_of_block = stretches.units;
    return piece;
  }
};

}  // namespace saw_int4
