"""decode's division of work (csrc/decode/schedule.h), compiled alone: every unit once, equal shares, no slot twice."""

import subprocess

from emulator import build

PROGRAM = r"""
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


def test_every_unit_is_done_once_and_blocks_have_equal_shares(tmp_path):
    source, program = tmp_path / "schedule.cpp", tmp_path / "schedule"
    source.write_text(PROGRAM)
    build.run([build.compiler(), "-std=c++20", "-O1", f"-I{build.ROOT / 'csrc'}", str(source), "-o", str(program)])
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
