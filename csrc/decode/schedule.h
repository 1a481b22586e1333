// How decode divides its work: pure functions of lengths and counts, run by the kernel and by the tests.
//
// The work of request b is a sequence of units, one for each (group of KV heads, pass of query rows, tile of tokens),
// tiles fastest. The groups of heads are dealt out to a power of two of columns, the blocks too. The units of all
// requests in a column form one line, cut every ceil(units / blocks of the column) units: each block takes one stretch.
// Cuts follow from seq_lens alone, so that a captured launch is balanced at every replay. A run of tiles that several
// blocks share (a "piece" each) is merged by the last of them to finish, or by a second launch.
//
// All columns are cut alike: neighbouring blocks read neighbouring heads of the same tokens at the same time, and the
// memory sectors in which those lie come from HBM once. Columns divide groups and blocks, so they cost no balance.
//
// Where a run is cut thus depends on the batch, and with it the rounding of its sums. A batch-invariant launch makes
// units of several tiles instead, by the length of their own run alone, and every unit a piece.
#pragma once

#include <cstdint>

#include "format.h"

namespace saw_int4 {

// Everything is 32 bits wide and tiles are powers of two: this arithmetic runs at the start of every block, where each
// division is a tenth of a microsecond. The host refuses launches that could have 2^31 units.

// The tiles that the query rows of one request see: [first_tile, first_tile + tiles), never empty, so that some block
// writes the output of a request of length 0 too.
struct TileRange {
  int first_tile;
  int tiles;
};

// seq_len: tokens, the q_len new ones included. window: as in DecodeParams. Tiles have 2^tile_shift tokens.
SAW_INT4_HD constexpr TileRange tile_range(int seq_len, int q_len, int64_t window, int tile_shift) {
  const int first_position = seq_len - q_len;
  const int first =
      window >= 0 && first_position > window ? (first_position - static_cast<int>(window)) >> tile_shift : 0;
  const int end = (seq_len >> tile_shift) + ((seq_len & ((1 << tile_shift) - 1)) != 0 ? 1 : 0);
  return {first, end > first ? end - first : 1};
}

// Passes over the keys that the query rows of one KV head need.
SAW_INT4_HD constexpr int row_passes(int q_len, int group, int rows_per_pass) {
  return (q_len * group + rows_per_pass - 1) / rows_per_pass;
}

// How a run of tiles becomes units of tiles_per_unit tiles each, the last perhaps of fewer. max_pieces: 0, or the most
// units of a run in a batch-invariant launch.
struct RunUnits {
  int units, tiles_per_unit;
};
SAW_INT4_HD constexpr RunUnits run_units(int tiles, int max_pieces) {
  if (max_pieces == 0) return {tiles, 1};
  const int tiles_per_unit = (tiles + max_pieces - 1) / max_pieces;
  return {(tiles + tiles_per_unit - 1) / tiles_per_unit, tiles_per_unit};
}

// Units of a request in one column; 0 when it has no query rows.
SAW_INT4_HD constexpr int request_units(int seq_len, int q_len, int64_t window, int tile_shift, int max_pieces,
                                        int group, int rows_per_pass, int head_groups_of_column) {
  if (q_len == 0) return 0;
  return run_units(tile_range(seq_len, q_len, window, tile_shift).tiles, max_pieces).units *
         row_passes(q_len, group, rows_per_pass) * head_groups_of_column;
}

// Logarithm of the number of columns: the largest power of two that divides groups of heads and blocks.
SAW_INT4_HD constexpr int column_shift(int head_groups, int blocks) {
  int shift = 0;
  while (((head_groups | blocks) >> shift) % 2 == 0) ++shift;
  return shift;
}

// A block's place: block i is number i / columns of column i % columns.
struct BlockPlace {
  int column, number, shift;

  // The n-th group of heads of the block's column, among all.
  SAW_INT4_HD constexpr int head_group(int n) const { return (n << shift) + column; }
  // The n-th slot of the workspace that belongs to the column, among all.
  SAW_INT4_HD constexpr int slot(int n) const { return (n << shift) + column; }
};
SAW_INT4_HD constexpr BlockPlace block_place(int block, int column_shift) {
  return {block & ((1 << column_shift) - 1), block >> column_shift, column_shift};
}

// A column's line of units, cut into stretches of equal length; the last may be shorter, and blocks past it have none.
struct Stretches {
  int units;  // of a block

  // First unit of a block of the column, and the block that owns a unit.
  SAW_INT4_HD constexpr int begin(int number) const { return number * units; }
  SAW_INT4_HD constexpr int block_of(int unit) const { return unit / units; }

  // The slot, of the column's, where a block writes its piece of the run that starts at unit run_begin. A block has at
  // most two pieces that others share: the one it starts with and the one it ends with.
  SAW_INT4_HD constexpr int slot(int run_begin, int number) const {
    return 2 * number + (begin(number) >= run_begin ? 0 : 1);
  }
};

// Long stretches are whole stages of tiles_per_stage (1 or 2) units: the busiest block has little more to do, runs of
// 2^n tiles are cut into fewer pieces, and no stage is half empty.
inline constexpr int kWholeStagesFrom = 8;
SAW_INT4_HD constexpr Stretches cut(int units_of_column, int blocks_of_column, int tiles_per_stage) {
  const int units = (units_of_column + blocks_of_column - 1) / blocks_of_column;
  return {units > kWholeStagesFrom ? units + units % tiles_per_stage : units};
}

}  // namespace saw_int4
