// What the host fixes before a decode launch: block shape, pipeline depth, shared memory, workspace. Pure functions of
// shapes and of the device's limits; csrc/README.md derives the rules.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device_limits.h"
#include "decode/schedule.h"
#include "format.h"
#include "params.h"

namespace saw_int4 {

inline constexpr int kRowsPerTile = 8;  // query rows of one MMA
inline constexpr int kWideTiles = 4;    // row tiles of a wide pass
inline constexpr int kWideWays = 4;     // warps that share a head's tokens in a wide pass: those of a shared_mma
// Batch-invariant launches: few pieces would leave a long context to few blocks, many cost memory and merging.
inline constexpr int kInvariantPieces = 16;
inline constexpr int kInvariantHeads = 4;
// Of a run, for each warp of the block that adds up its records. Measured: README.md.
inline constexpr int kMergeLaunchFrom = 16;  // records; where more, a second launch pays
inline constexpr int kPiecesCost = 24;       // records, and two for each head of a piece; where more, fewer heads pay
inline constexpr int kRecordPadding = 4;     // words of a stored row of a piece beside O (merge.cuh)
inline constexpr int kNarrowWarps = 8;       // of a block, at most
inline constexpr int kWideWarps = 16;
inline constexpr int kMergeWarps = 16;           // of a block of the merge kernel
inline constexpr int kMergedRequests = 32;       // of its launch, at most: a lane each
inline constexpr int kMaxStages = 4;             // of all blocks of an SM together
inline constexpr int kDecodeScratchBytes = 112;  // of a block, for the walk along its work

// Query-row tiles the kernel is compiled for: 8, 16 or 32 rows per pass over the keys.
constexpr int max_row_tiles(int head_dim, int groups) {
  if (head_dim == 128 || (head_dim == 64 && groups == 1)) return kWideTiles;
  return head_dim == 64 || head_dim == 256 ? 2 : 1;
}

// Passes of up to 16 rows are narrow: a warp has tokens of its own and all channels of them (narrow.cuh). Wider ones
// share tokens among four warps (wide.cuh).
constexpr bool is_wide(int row_tiles) {
  return row_tiles > 2;
}

// Most warps of a block, and blocks of so many per SM that the registers allow (128 or 255 per thread). Two groups per
// row have a second set of products and weights; 16 warps need much shared memory.
constexpr int max_warps(int row_tiles, int groups, bool large_shared) {
  return is_wide(row_tiles) && groups == 1 && large_shared ? kWideWarps : kNarrowWarps;
}
constexpr int blocks_by_registers(int head_dim, int row_tiles, int groups) {
  if (is_wide(row_tiles)) return 1;
  if (groups > 1) return head_dim * row_tiles <= 128 ? 2 : 1;
  return head_dim <= 128 ? 2 : 1;
}

// Tokens that a warp takes of each stage, and tiles of 16 of them that it takes at a time: two hide more latency, one
// needs fewer registers.
constexpr int tokens_per_warp(int row_tiles, int groups) {
  return is_wide(row_tiles) && groups > 1 ? 16 : 32;
}
constexpr int token_tiles(int head_dim, int row_tiles, int groups) {
  if (is_wide(row_tiles)) return tokens_per_warp(row_tiles, groups) / 16;
  if (groups > 1) return row_tiles == 1 || head_dim == 128 ? 2 : 1;
  return head_dim == 128 && row_tiles == 2 ? 1 : 2;
}

// Turns, at most, in which the threads of a wide pass request a stage: a chunk of 16 bytes of K and of V each. A head's
// row may begin anywhere in a chunk.
constexpr int wide_copy_turns(int head_dim, int groups) {
  const int chunks = (row_bytes(head_dim, groups) + 12 + 15) / 16;
  return (tokens_per_warp(kWideTiles, groups) * chunks + 31) / 32;
}

// Tiles are what work is divided into. With one row tile they are half a stage, so that short contexts reach twice as
// many blocks; with more, the code for half a stage would cost registers.
constexpr int tiles_per_stage(int row_tiles) {
  return row_tiles == 1 ? 2 : 1;
}

// One row tile stays in registers, more lie in shared memory.
constexpr bool query_in_registers(int row_tiles) {
  return row_tiles == 1;
}

constexpr int query_words_per_lane(int head_dim) {
  return (head_dim + 31) / 32;
}

inline constexpr int kScoreTermsBytes = 16;  // of shared memory, for a query row (query.cuh)

// Shared memory for the fragments and score terms of one KV head.
constexpr int query_bytes(int head_dim, int row_tiles) {
  return row_tiles * (query_words_per_lane(head_dim) * 512 + kRowsPerTile * kScoreTermsBytes);
}

// Shared memory where four warps of a wide pass meet: the weights of their tokens, the reference logits of their rows.
constexpr int four_warps_bytes(int row_tiles, int groups) {
  const int rows = row_tiles * kRowsPerTile;
  return kWideWays * tokens_per_warp(row_tiles, groups) * rows * 2 * groups + rows * 4;
}

// Shapes of a launch, known at capture time.
struct DecodeShape {
  int head_dim;
  int num_q_heads;
  int num_kv_heads;
  int num_requests;
  int max_q_len;
  bool batch_invariant = false;
  int groups = 1;
};

struct DecodePlan {
  int row_tiles = 0;         // n-tiles of 8 query rows per pass
  int warps = 0;             // per block
  int blocks = 0;            // of the grid
  int heads_per_block = 0;   // KV heads; a power of two, divides num_kv_heads
  int heads_shift = 0;       // its logarithm
  int head_groups = 0;       // num_kv_heads / heads_per_block
  int column_shift = 0;      // of the grid (schedule.h)
  int ways = 0;              // warps that share a KV head, each with other tokens; a power of two
  int ways_shift = 0;        // its logarithm
  int tile_tokens = 0;       // a power of two
  int tile_shift = 0;        // its logarithm
  int max_pieces = 0;        // of a run in a batch-invariant launch, else 0 (schedule.h)
  int group = 0;             // query heads per KV head
  uint32_t group_magic = 0;  // mul_hi(i, group_magic) == i / group for i < 2^16 and group > 1
  int rows_per_head = 0;     // query rows of a KV head and pass that may be in use
  int stages = 0;            // in shared memory
  int stage_tokens = 0;      // ways * tokens_per_warp
  int chunk_bytes = 0;       // of one cp.async: 16, 8 or 4
  int chunks_per_token = 0;  // that cover heads_per_block rows
  uint32_t chunk_magic = 0;  // mul_hi(i, chunk_magic) == i / chunks_per_token for i < 2^16
  int token_stride = 0;      // bytes between tokens in shared memory; 16 mod 32, so that fragments miss no bank
  int stage_bytes = 0;       // K and V of one stage
  int stages_bytes = 0;      // of shared memory for stages and merges
  int query_offset = 0;      // byte positions in shared memory, after the stages
  int fours_offset = 0;      // where each four warps meet
  int slots_offset = 0;
  int rows_offset = 0;
  int scratch_offset = 0;
  int shared_bytes = 0;
  bool merge_launch = false;  // runs are merged by a second launch. Here, or the widest kernel spills registers.
  int64_t piece_floats = 0;   // of the workspace, per piece
};

// mul_hi(i, reciprocal(d)) == i / d for i, d < 2^16, d > 1.
constexpr uint32_t reciprocal(int d) {
  return static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d);
}

// Fills in what follows from heads_per_block, warps and stages.
inline void lay_out(DecodePlan& plan, const DecodeShape& shape) {
  const int row = row_bytes(shape.head_dim, shape.groups);
  const int token = shape.num_kv_heads * row, run = plan.heads_per_block * row;
  plan.chunk_bytes = token % 16 == 0 ? 16 : token % 8 == 0 ? 8 : 4;
  // A run of heads may start anywhere in a chunk; no run reads past its token.
  int window = 0;
  for (int first = 0; first < shape.num_kv_heads; first += plan.heads_per_block)
    window = std::max(window, first * row % plan.chunk_bytes + run);
  plan.chunks_per_token = (window + plan.chunk_bytes - 1) / plan.chunk_bytes;
  plan.chunk_magic = reciprocal(plan.chunks_per_token);
  plan.token_stride = (plan.chunks_per_token * plan.chunk_bytes + 15) / 16 * 16;
  if (plan.token_stride % 32 == 0) plan.token_stride += 16;
  plan.head_groups = shape.num_kv_heads / plan.heads_per_block;
  for (plan.heads_shift = 0; (1 << plan.heads_shift) < plan.heads_per_block;) ++plan.heads_shift;
  plan.ways = plan.warps / plan.heads_per_block;
  for (plan.ways_shift = 0; (1 << plan.ways_shift) < plan.ways;) ++plan.ways_shift;
  plan.stage_tokens = plan.ways * tokens_per_warp(plan.row_tiles, shape.groups);
  plan.tile_tokens = plan.stage_tokens / tiles_per_stage(plan.row_tiles);
  for (plan.tile_shift = 0; (1 << plan.tile_shift) < plan.tile_tokens;) ++plan.tile_shift;
  plan.group = shape.num_q_heads / shape.num_kv_heads;
  plan.group_magic = reciprocal(plan.group);
  plan.rows_per_head = std::min(plan.group * shape.max_q_len, kRowsPerTile * plan.row_tiles);
  plan.stage_bytes = 2 * plan.stage_tokens * plan.token_stride;
  // The stages double as the place where a piece is put together: of one row tile and every warp, or, after a wide
  // pass, of all rows and every four. Before that, the last of them, which is filled last, is where a query passes
  // through that is to stay in registers.
  const bool wide = is_wide(plan.row_tiles), in_registers = query_in_registers(plan.row_tiles);
  const int fours = wide ? plan.warps / kWideWays : 0;
  const int records = (wide ? fours * plan.row_tiles : plan.warps) * kRowsPerTile;
  const int query = plan.heads_per_block * query_bytes(shape.head_dim, plan.row_tiles);
  if (in_registers) plan.stage_bytes = std::max(plan.stage_bytes, query);
  plan.stages_bytes = std::max(plan.stages * plan.stage_bytes, records * (shape.head_dim + kRecordPadding) * 4);
  plan.query_offset = in_registers ? (plan.stages - 1) * plan.stage_bytes : plan.stages_bytes;
  plan.fours_offset = in_registers ? plan.stages_bytes : plan.stages_bytes + query;
  plan.slots_offset = plan.fours_offset + fours * four_warps_bytes(plan.row_tiles, shape.groups);
  plan.rows_offset = plan.slots_offset + plan.stages * plan.stage_tokens * 4;
  plan.scratch_offset = plan.rows_offset + kRowsPerTile * plan.row_tiles * 16;
  plan.shared_bytes = plan.scratch_offset + kDecodeScratchBytes;
  plan.piece_floats =
      static_cast<int64_t>(plan.heads_per_block) * plan.rows_per_head * (shape.head_dim + kRecordPadding);
}

// Runs of the launch, at most.
inline int64_t most_runs(const DecodePlan& plan, int num_requests, int max_q_len) {
  return static_cast<int64_t>(num_requests) * plan.head_groups *
         row_passes(max_q_len, plan.group, kRowsPerTile * plan.row_tiles);
}

// Pieces of a run, at most, when the runs share the grid evenly.
inline int64_t pieces_of_run(const DecodePlan& plan, const DecodeShape& shape) {
  const int64_t runs = most_runs(plan, std::max(shape.num_requests, 1), shape.max_q_len);
  return (plan.blocks + runs - 1) / runs;
}

// The second launch that merges (merge_kernel.cuh): a block for each row of each run that there may be.
struct MergePlan {
  int runs_of_request = 0;  // in a column, at most
  int rows_of_run = 0;      // of all its heads, at most
  int blocks = 0;           // of the grid
};

inline MergePlan merge_plan(const DecodePlan& plan, int num_requests, int max_q_len) {
  MergePlan merge;
  const int64_t runs = most_runs(plan, num_requests, max_q_len);
  merge.runs_of_request = static_cast<int>(runs / num_requests >> plan.column_shift);
  merge.rows_of_run = plan.rows_per_head * plan.heads_per_block;
  merge.blocks = static_cast<int>(runs * merge.rows_of_run);
  return merge;
}

// A second launch merges where the last block of a run would have many records to add up, and rows are few in all: at
// most two blocks per SM.
inline bool wants_merge_launch(const DecodePlan& plan, const DecodeShape& shape, const DeviceLimits& device) {
  if (!device.dependent_launches || shape.batch_invariant || shape.num_requests > kMergedRequests) return false;
  const int64_t rows = plan.rows_per_head * plan.heads_per_block;
  return most_runs(plan, shape.num_requests, shape.max_q_len) * rows <= 2 * device.sm_count &&
         pieces_of_run(plan, shape) * rows > kMergeLaunchFrom * plan.warps;
}

// KV heads in one block: the more, the longer the contiguous runs that are read; the fewer, the less there is to
// transform and to merge when few requests fill the machine (kPiecesCost), unless a second launch merges. False
// when no pipeline of two stages fits.
inline bool try_plan(DecodePlan& plan, const DecodeShape& shape, const DeviceLimits& device, int warps,
                     int most_warps) {
  const bool wide = is_wide(plan.row_tiles);
  plan.warps = warps;
  int heads = wide ? warps / kWideWays : warps;
  if (shape.batch_invariant) heads = std::min(heads, kInvariantHeads);
  for (; heads >= 1; heads /= 2) {
    if (shape.num_kv_heads % heads != 0) continue;
    plan.heads_per_block = heads;
    const int most = blocks_by_registers(shape.head_dim, plan.row_tiles, shape.groups) * (most_warps / plan.warps);
    bool fits = false;
    for (int per_sm = most; per_sm >= 1 && !fits; --per_sm) {
      const int budget =
          std::min(device.shared_bytes_per_sm / per_sm - kSharedReservedPerBlock, device.shared_bytes_per_block);
      plan.stages = std::max(kMaxStages / per_sm, 2) + 1;
      while (!fits && plan.stages > 2) {
        --plan.stages;
        lay_out(plan, shape);
        fits = plan.shared_bytes <= budget;
      }
      plan.blocks = device.sm_count * per_sm;
    }
    if (!fits && warps > 4) return false;  // fewer warps first
    if (!fits) continue;                   // then fewer heads
    plan.column_shift = column_shift(plan.head_groups, plan.blocks);
    plan.merge_launch = wants_merge_launch(plan, shape, device);
    const int64_t cost = pieces_of_run(plan, shape) * heads * (plan.rows_per_head + 2);
    // With a second launch, two heads, as long as a warp has no more than a row of the query to transform.
    const bool merged_well =
        plan.merge_launch ? heads == 2 && 2 * plan.rows_per_head <= kNarrowWarps : cost <= kPiecesCost * plan.warps;
    if (heads == 1 || shape.batch_invariant || merged_well) return true;
  }
  return false;
}

inline DecodePlan decode_plan(const DecodeShape& shape, const DeviceLimits& device) {
  const int rows = shape.num_q_heads / shape.num_kv_heads * shape.max_q_len;
  DecodePlan plan;
  plan.row_tiles = rows <= 8 ? 1 : rows <= 16 ? 2 : kWideTiles;
  plan.row_tiles = std::min(plan.row_tiles, max_row_tiles(shape.head_dim, shape.groups));
  plan.max_pieces = shape.batch_invariant ? kInvariantPieces : 0;
  const int most = max_warps(plan.row_tiles, shape.groups, device.shared_bytes_per_block >= kLargeSharedBytes);
  // Two blocks of an SM are rarely in the same phase of a wide pass: better than one of twice the warps and heads,
  // where that leaves little to merge, or a second launch merges.
  if (most == kWideWarps && !shape.batch_invariant && try_plan(plan, shape, device, most / 2, most) &&
      (plan.heads_per_block == 2 || plan.merge_launch))
    return plan;
  for (int warps = most; warps >= 4; warps /= 2)
    if (try_plan(plan, shape, device, warps, most)) return plan;
  throw std::runtime_error("decode_attention: a block needs " + std::to_string(plan.shared_bytes) +
                           " bytes of shared memory for head_dim " + std::to_string(shape.head_dim) +
                           ", the device offers " + std::to_string(device.shared_bytes_per_block));
}

// Workspace: the pieces' partial results from the front, one counter per query row and head from the back. Counters
// are zero between launches. Enough for every call of at most num_query_rows rows, max_q_len among them
// (batch-invariant: requests times max_q_len).
inline int64_t decode_workspace_bytes(int sm_count, int64_t num_query_rows, int num_q_heads, int head_dim,
                                      bool batch_invariant) {
  const int64_t rows = num_query_rows * num_q_heads;
  // Rows in flight per SM: 16 warps x 8 or 16 rows, or a quarter of 16 warps x 32; up to 4 blocks share the rows of one
  // request, and a block has two pieces. Batch-invariant: every piece of every row, whose last pass may be half empty.
  const int64_t rows_per_sm = std::min<int64_t>(16 * 2 * kRowsPerTile, 4 * rows);
  const int64_t records = batch_invariant ? 2 * kInvariantPieces * rows : 2 * sm_count * rows_per_sm;
  return (records * (head_dim + kRecordPadding) + rows) * 4;
}

// What a launch needs of it, at most.
inline int64_t workspace_needed(const DecodePlan& plan, const DecodeShape& shape, int64_t num_query_rows) {
  const int64_t runs = most_runs(plan, shape.num_requests, shape.max_q_len);
  const int64_t slots = plan.max_pieces > 0 ? plan.max_pieces * runs : 2 * plan.blocks;
  return (slots * plan.piece_floats + num_query_rows * shape.num_q_heads) * 4;
}

}  // namespace saw_int4
