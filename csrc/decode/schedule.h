// How decode divides its work: pure functions of lengths and counts, run by the kernel and by the tests.
//
// The work of request b is a sequence of units, one for each (group of KV heads, pass of query rows, tile of tokens),
// tiles fastest. The units of all requests form one line; of the G blocks that work, block i takes the stretch
// [block_begin(i), block_begin(i + 1)). Stretches differ by at most one unit whatever the lengths are, and follow from
// seq_lens alone, so that a captured launch is balanced at every replay. A run of tiles that several blocks share
// (a "piece" each) is merged by the last of them to finish.
#pragma once

#include <cstdint>

#include "format.h"

namespace saw_int4 {

// The tiles that the query rows of one request see: [first_tile, first_tile + tiles), never empty, so that some block
// writes the output of a request of length 0 too.
struct TileRange {
  int first_tile;
  int tiles;
};

// seq_len: tokens, the q_len new ones included. window: as in DecodeParams.
SAW_INT4_HD constexpr TileRange tile_range(int64_t seq_len, int q_len, int64_t window, int tile_tokens) {
  int64_t first = 0;
  if (window >= 0 && seq_len - q_len > window) first = (seq_len - q_len - window) / tile_tokens;
  const int64_t end = (seq_len + tile_tokens - 1) / tile_tokens;
  return {static_cast<int>(first), static_cast<int>(end > first ? end - first : 1)};
}

// Passes over the keys that the query rows of one KV head need.
SAW_INT4_HD constexpr int row_passes(int q_len, int group, int rows_per_pass) {
  return (q_len * group + rows_per_pass - 1) / rows_per_pass;
}

// Units of a request; 0 when it has no query rows.
SAW_INT4_HD constexpr int64_t request_units(int64_t seq_len, int q_len, int64_t window, int tile_tokens, int group,
                                            int rows_per_pass, int head_groups) {
  if (q_len == 0) return 0;
  return static_cast<int64_t>(tile_range(seq_len, q_len, window, tile_tokens).tiles) *
         row_passes(q_len, group, rows_per_pass) * head_groups;
}

// Blocks that get work: no stretch between two others is empty, so a run's blocks are counted by their indices.
SAW_INT4_HD constexpr int working_blocks(int64_t total_units, int blocks) {
  return total_units < blocks ? static_cast<int>(total_units) : blocks;
}

// First unit of a block, and the block that owns a unit.
SAW_INT4_HD constexpr int64_t block_begin(int64_t total_units, int block, int blocks) {
  return total_units * block / blocks;
}
SAW_INT4_HD constexpr int block_of_unit(int64_t total_units, int64_t unit, int blocks) {
  return static_cast<int>(((unit + 1) * blocks - 1) / total_units);
}

// Where block writes its piece of the run that starts at unit run_begin. A block has at most two pieces that others
// share: the one it starts with and the one it ends with.
SAW_INT4_HD constexpr int piece_slot(int64_t total_units, int64_t run_begin, int block, int blocks) {
  return 2 * block + (block_begin(total_units, block, blocks) >= run_begin ? 0 : 1);
}

}  // namespace saw_int4
