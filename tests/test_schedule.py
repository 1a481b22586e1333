"""decode's division of work (csrc/decode/schedule.h) and its plans for every kind of GPU (config.h), compiled alone."""

import subprocess

from emulator import build

SCHEDULE = r"""
#include <algorithm>
#include <cstdio>
#include <set>
#include <vector>
#include "decode/schedule.h"
using namespace saw_int4;
int main() {
  int wrong = 0;
  const auto check = [&](bool ok, const char* what, int groups, int blocks) {
    if (!ok && ++wrong < 10) std::printf("%s, %d head groups, %d blocks\n", what, groups, blocks);
  };
  for (int groups : {1, 2, 3, 4, 6, 8}) {
    for (int blocks : {1, 2, 6, 80, 132, 264}) {
      const int shift = column_shift(groups, blocks), columns = 1 << shift;
      check(groups % columns == 0 && blocks % columns == 0, "columns divide neither", groups, blocks);
      check(groups % (2 * columns) != 0 || blocks % (2 * columns) != 0, "too few columns", groups, blocks);
      for (int tiles : {1, 5, 64, 513}) for (int stage : {1, 2}) {
        const int requests = 3, runs = requests * groups / columns, units = runs * tiles;
        const Stretches cuts = cut(units, blocks / columns, stage);
        const int share = (requests * groups * tiles + blocks - 1) / blocks;
        const bool whole_stages = share > kWholeStagesFrom && stage == 2;
        check(cuts.units == share + (whole_stages ? share % 2 : 0), "a block has another share", groups, blocks);
        std::vector<int> seen(columns * units);
        std::set<int> slots;
        for (int b = 0; b < blocks; ++b) {
          const BlockPlace place = block_place(b, shift);
          const int end = std::min(units, cuts.begin(place.number + 1));
          for (int u = cuts.begin(place.number); u < end;) {
            const int run = u / tiles, run_end = std::min(end, (run + 1) * tiles);
            const int group = place.head_group(run % (groups / columns));
            check(group < groups && group % columns == place.column, "a group of another column", groups, blocks);
            const int slot = place.slot(cuts.slot(run * tiles, place.number));
            const bool shared = cuts.block_of(run * tiles) != cuts.block_of((run + 1) * tiles - 1);
            if (shared)
              check(slot < 2 * blocks && slots.insert(slot).second, "a slot twice, or past the end", groups, blocks);
            for (; u < run_end; ++u) {
              check(cuts.block_of(u) == place.number, "a unit of another block", groups, blocks);
              ++seen[place.column * units + u];
            }
          }
        }
        for (int n : seen) check(n == 1, "a unit not done once", groups, blocks);
      }
    }
  }
  return wrong != 0;
}
"""


PLANS = r"""
#include <cstdio>
#include "decode/config.h"
using namespace saw_int4;
int main() {
  int wrong = 0;
  const auto check = [&](bool ok, const char* what, const DecodeShape& s, const DeviceLimits& device) {
    if (!ok && ++wrong < 10)
      std::printf("%s: head_dim %d, %d and %d heads, %d requests, max_q_len %d, %d groups%s, %d SMs, %d bytes\n", what,
                  s.head_dim, s.num_q_heads, s.num_kv_heads, s.num_requests, s.max_q_len, s.groups,
                  s.batch_invariant ? ", batch-invariant" : "", device.sm_count, device.shared_bytes_per_block);
  };
  const DeviceLimits h100{132, 228 * 1024, 227 * 1024, true}, a100{108, 164 * 1024, 163 * 1024};
  const DeviceLimits l40s{142, 100 * 1024, 99 * 1024}, blackwell{188, 100 * 1024, 99 * 1024, true};
  for (const DeviceLimits& device : {h100, a100, l40s, blackwell})
    for (int head_dim : {64, 80, 96, 112, 128, 192, 256}) for (int groups : {1, 2})
      for (int kv_heads : {1, 2, 3, 4, 5, 8, 12, 16, 32}) for (int group : {1, 2, 4, 5, 7, 16})
        for (int rows : {1, 2, 5, 8, 16}) for (int requests : {1, 3, 32, 33, 64, 1000})
          for (bool invariant : {false, true}) {
          const DecodeShape shape{head_dim, kv_heads * group, kv_heads, requests, rows, invariant, groups};
          DecodePlan plan;
          try {
            plan = decode_plan(shape, device);
          } catch (const std::runtime_error&) {
            check(false, "no plan", shape, device);
            continue;
          }
          const int per_sm = plan.blocks / device.sm_count;
          const bool fits = plan.shared_bytes <= device.shared_bytes_per_block &&
                            per_sm * (plan.shared_bytes + kSharedReservedPerBlock) <= device.shared_bytes_per_sm;
          check(fits, "too much shared memory", shape, device);
          // The kernel's launch bounds: dev::kLargeShared is true of sm_90 alone among these.
          const int most_warps = max_warps(plan.row_tiles, groups, device.sm_count == h100.sm_count);
          check(plan.warps <= most_warps, "too many warps", shape, device);
          check(most_warps < kWideWarps || plan.warps * per_sm == kWideWarps, "half of an SM", shape, device);
          const bool whole = kv_heads % plan.heads_per_block == 0 && plan.ways * plan.heads_per_block == plan.warps &&
                             plan.ways >= (is_wide(plan.row_tiles) ? kWideWays : 1);
          check(whole, "heads do not divide", shape, device);
          const int turns = wide_copy_turns(head_dim, groups) * plan.warps * 32;
          const bool copied = plan.stage_tokens * plan.chunks_per_token <= turns;
          check(!is_wide(plan.row_tiles) || plan.chunk_bytes < 16 || copied, "copies left over", shape, device);
          check(plan.stages >= 2 && plan.stages <= kMaxStages, "no pipeline", shape, device);
          const bool one_wave = merge_plan(plan, requests, rows).blocks <= 2 * device.sm_count;
          const bool may_depend = device.dependent_launches && !invariant && one_wave;
          check(!plan.merge_launch || may_depend, "a second launch", shape, device);
          // As few query rows as a call may have.
          const int64_t query_rows = invariant ? int64_t{requests} * rows : rows;
          const int64_t workspace =
              decode_workspace_bytes(device.sm_count, query_rows, shape.num_q_heads, head_dim, invariant);
          check(workspace_needed(plan, shape, query_rows) <= workspace, "workspace too small", shape, device);
        }
  // Heads of a block, and who merges: as measured (csrc/README.md), 32 query heads on 8.
  const auto decode_rows = [&](const DeviceLimits& device, int rows, int requests, int heads, bool merge_launch) {
    const DecodeShape shape{128, 32, 8, requests, rows, false, 1};
    const DecodePlan plan = decode_plan(shape, device);
    check(plan.heads_per_block == heads && plan.merge_launch == merge_launch, "other merging", shape, device);
  };
  for (int requests : {1, 2}) decode_rows(h100, 1, requests, 2, true), decode_rows(a100, 1, requests, 1, false);
  decode_rows(h100, 1, 3, 2, true), decode_rows(h100, 1, 8, 2, false), decode_rows(h100, 1, 64, 4, false);
  decode_rows(h100, 1, 256, 8, false), decode_rows(h100, 2, 8, 2, false), decode_rows(h100, 4, 8, 1, false);
  decode_rows(h100, 4, 64, 2, false), decode_rows(h100, 8, 4, 1, false), decode_rows(h100, 8, 64, 2, false);
  // Both ways to merge in what captures a graph (tests/test_decode_attention.py) and what the sanitizer sees.
  const auto merged = [&](int kv_heads, int requests, int rows, bool merge_launch) {
    const DecodeShape shape{128, 4 * kv_heads, kv_heads, requests, rows, false, 1};
    check(decode_plan(shape, h100).merge_launch == merge_launch, "other merging", shape, h100);
  };
  merged(2, 5, 1, true), merged(8, 5, 1, false), merged(8, 8, 8, false);
  // Warps of a wide pass: those that tests/test_decode_attention.py runs on pretended devices; on a GPU, for 1, 8 and
  // 40 requests.
  const auto wide = [&](const DeviceLimits& device, int head_dim, int groups, int kv_heads, int requests, int warps) {
    const DecodeShape shape{head_dim, 4 * kv_heads, kv_heads, requests, 8, false, groups};
    check(decode_plan(shape, device).warps == warps, "other warps", shape, device);
  };
  const DeviceLimits pretended{4, 228 * 1024, 227 * 1024, true};
  for (int head_dim : {64, 128}) {
    wide(pretended, head_dim, 1, 2, 3, 16), wide(pretended, head_dim, 1, 4, 3, 8), wide(a100, head_dim, 1, 2, 3, 8);
    wide(h100, head_dim, 1, 8, 1, 8), wide(h100, head_dim, 1, 8, 8, 16), wide(h100, head_dim, 1, 8, 40, 8);
  }
  wide(pretended, 128, 2, 2, 3, 8), wide(pretended, 128, 1, 4, 1, 16);
  const DecodeShape invariant{128, 16, 4, 3, 8, true, 1};
  const DecodePlan four_heads = decode_plan(invariant, pretended);
  check(four_heads.warps == 16 && four_heads.heads_per_block == 4, "other heads", invariant, pretended);
  wide(l40s, 64, 1, 2, 3, 8), wide(l40s, 128, 1, 2, 3, 4), wide(l40s, 128, 2, 2, 3, 8);
  return wrong != 0;
}
"""


def check(program: str, folder):
    """Compile and run a program that prints what is wrong."""
    source, binary = folder / "program.cpp", folder / "program"
    source.write_text(program)
    build.run([build.compiler(), "-std=c++20", "-O1", f"-I{build.ROOT / 'csrc'}", str(source), "-o", str(binary)])
    done = subprocess.run([binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_unit_is_done_once_and_blocks_have_equal_shares(tmp_path):
    check(SCHEDULE, tmp_path)


def test_every_shape_has_a_plan_that_fits_the_device(tmp_path):
    check(PLANS, tmp_path)
