// Adds up the pieces of the runs that several blocks of decode share, and writes their rows: a second launch, whose
// blocks start as those of the first leave. Until the first has ended they look up which run is theirs.
#pragma once

#include "decode/merge.cuh"

namespace saw_int4 {

// A run that blocks share; pieces <= 1: there is none.
struct SharedRun {
  RunRows rows;
  Share share = {};
};

// Number `index` of the runs that the launch may have, for all lanes of a warp.
SAW_INT4_DEVICE SharedRun find_run(const DecodeParams& p, const DecodePlan& plan, const MergePlan& merge, int index) {
  const int rows_per_pass = kRowsPerTile * plan.row_tiles, heads = plan.head_groups >> plan.column_shift;
  const BlockPlace place = block_place(index, plan.column_shift);
  const int b = place.number / merge.runs_of_request, run = place.number - b * merge.runs_of_request;
  const Line line(p, plan, rows_per_pass);
  const Stretches stretches = cut(line.total, plan.blocks >> plan.column_shift, tiles_per_stage(plan.row_tiles));
  const LinePlace at = line.first_of(b);  // a request per lane: kMergedRequests
  const Request& r = at.request;
  if (run >= row_passes(r.q_len, plan.group, rows_per_pass) * heads) return {};
  const int units = run_units(tile_range(r.seq_len, r.q_len, p.window, plan.tile_shift).tiles, plan.max_pieces).units;
  const int begin = at.before + run * units;
  return {run_rows(plan, rows_per_pass, place, r, run), share_run(plan, place, stretches, begin, units, begin)};
}

template <int D>
SAW_INT4_KERNEL SAW_INT4_LAUNCH_BOUNDS(32 * kMergeWarps, D <= 128 ? 2 : 1)
    saw_int4_decode_merge_kernel(const DecodeParams p, const DecodePlan plan, const MergePlan merge) {
  constexpr int kBytes = Record<D>::kBytes;
  const int index = dev::block_index() / merge.rows_of_run, row = dev::block_index() - index * merge.rows_of_run;
  const SharedRun run = find_run(p, plan, merge, index);
  const int warp = dev::warp_id(), pieces = run.share.pieces;
  const PiecesOfWarp<D> mine(p, plan, run.share, row, warp, kMergeWarps);
  const uint32_t records = dev::shared_base();
  const bool used = pieces > 1 && row < run.rows.rows.rows << plan.heads_shift;
  dev::wait_for_launch_before();
  if (!used) return;
  RowPiece<D> sum = mine.sum((pieces - warp + kMergeWarps - 1) / kMergeWarps);
  store_record(sum, [&](int byte, const float4& x) { dev::st_shared(records + warp * kBytes + byte, x); });
  dev::block_sync();
  if (warp != 0) return;
  sum = sum_shared_records<D>(records, kBytes, pieces < kMergeWarps ? pieces : kMergeWarps);
  finish_row<D>(p, plan, run.rows.rows, run.rows.kv_head, sum, row);
}

}  // namespace saw_int4
