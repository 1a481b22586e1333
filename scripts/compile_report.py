"""What the compiler made of the CUDA kernels, per architecture: registers, shared memory, spills, inner loops.

Needs nvcc and nvdisasm, no GPU. Fails on spills, stack, local memory, narrow accesses in a loop, or a missing MMA.

    python scripts/compile_report.py                       every decode kernel and the usual others, every supported
                                                           architecture (minutes)
    python scripts/compile_report.py --arch 90a --all      every instance that the extension holds

Columns: registers per thread, bytes of stack and of spills, shared memory of a block (decode: as planned for 8 KV heads
and a group of 4), warps per SM that registers and shared memory allow. Then the inner loop (decode: a tile of 32 tokens
per warp; decode_merge: a warp's pieces; append: a row per group of lanes; gather, transform: the whole kernel), rare
branches included: instructions, instructions per code of a lane, and its memory accesses and MMAs by kind.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{HEADERS}"]
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
DTYPES = ("kFloat32", "kFloat16", "kBFloat16")


RESERVED_PER_BLOCK = 1024  # bytes of shared memory, by CUDA


@dataclass(frozen=True)
class Arch:
    warps: int  # per SM
    shared_per_sm: int
    shared_per_block: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". All have 65536 registers.
ARCHS = {
    "80": Arch(64, 164 * 1024, 163 * 1024),
    "86": Arch(48, 100 * 1024, 99 * 1024),
    "89": Arch(48, 100 * 1024, 99 * 1024),
    "90a": Arch(64, 228 * 1024, 227 * 1024),
    "100a": Arch(64, 228 * 1024, 227 * 1024),
    "120": Arch(48, 100 * 1024, 99 * 1024),
}


@dataclass(frozen=True)
class Operator:
    """params: the kernel's parameter types. usual, all: template arguments. needs: SASS that its loop must hold.
    narrow: SASS of accesses that waste bandwidth, and how many of them the loop may hold all the same. header: in
    csrc, where its name does not follow from the kernel's.
    """

    params: str
    usual: tuple[tuple, ...]
    all: tuple[tuple, ...]
    needs: tuple[str, ...]
    narrow: str
    narrow_allowed: int
    header: str | None = None


def typed(usual: tuple[tuple, ...]) -> dict[str, tuple[tuple, ...]]:
    """Of kernels by head_dim, dtype, and what else the usual ones differ in."""
    others = sorted({x[2:] for x in usual})
    return {"usual": usual, "all": tuple((d, t, *other) for d in HEAD_DIMS for t in DTYPES for other in others)}


def row_tiles(head_dim: int, groups: int) -> tuple[int, ...]:
    """Row tiles that decode is compiled for: max_row_tiles of csrc/decode/config.h."""
    most = 4 if head_dim == 128 or (head_dim, groups) == (64, 1) else 2 if head_dim in (64, 256) else 1
    return tuple(tiles for tiles in (1, 2, 4) if tiles <= most)


def append_lanes(head_dim: int) -> tuple[int, ...]:
    """Lanes of a row that append is compiled for: kAppendLanes, kManyAppendLanes of csrc/append/append_kernel.cuh."""
    lanes = 4 if head_dim % 32 == 0 else 2
    return (lanes, 1) if head_dim == 64 else (lanes,)


DECODE = tuple((d, tiles, groups) for d in HEAD_DIMS for groups in (1, 2) for tiles in row_tiles(d, groups))


OPERATORS = {
    # Slots are 4 bytes each, one load per lane and tile. Fragments of K are 4-byte LDS by design. All are usual: they
    # have no registers to spare, and what one architecture holds another spills.
    "decode": Operator(
        "DecodeParams, DecodePlan", usual=DECODE, all=DECODE,
        needs=(r"HMMA\.16816|HGMMA\.64x32x16", r"LDGSTS\S*\.128"),
        narrow=r"LDG\.(?!\S*\.128)|LDS\.[US](8|16)",
        narrow_allowed=1,
    ),
    # A row per block, its pieces four at a time; (m, l) of each are 8 bytes.
    "decode_merge": Operator(
        "DecodeParams, DecodePlan, MergePlan", usual=((64,), (128,), (256,)), all=tuple((d,) for d in HEAD_DIMS),
        needs=(r"LDG\S*\.128", "MUFU.EX2"), narrow=r"LDG\.(?!\S*\.(64|128))", narrow_allowed=0,
        header="decode/merge_kernel.cuh",
    ),
    # One slot per row, on either way through a loop. Rows of codes are 4-byte aligned: their stores are narrow by the
    # format.
    "append": Operator(
        "AppendParams, AppendPlan",
        usual=tuple((d, lanes, t, groups, calibrated) for d, lanes, t, groups in (
            (256, 4, "kBFloat16", 1), (128, 4, "kFloat32", 1), (128, 4, "kBFloat16", 2), (64, 1, "kBFloat16", 1),
            (64, 1, "kBFloat16", 2)) for calibrated in ("false", "true")),
        all=tuple((d, lanes, t, groups, calibrated) for d in HEAD_DIMS for lanes in append_lanes(d) for t in DTYPES
                  for groups in (1, 2) for calibrated in ("false", "true")),
        needs=(r"LDGSTS\S*\.128", "IDP"), narrow=r"LDG(STS)?\.(?!\S*\.128)", narrow_allowed=2,
    ),
    "gather": Operator(
        "GatherParams", **typed(((128, "kBFloat16", 1), (256, "kBFloat16", 1), (128, "kBFloat16", 2))),
        needs=(r"STG\S*\.128",), narrow=r"STG\.(?!\S*\.128)", narrow_allowed=0,
    ),
    "transform": Operator(
        "TransformRowsParams", **typed(((128, "kBFloat16"), (256, "kBFloat16"))),
        needs=(r"LDG\S*\.128", r"STG\S*\.128"), narrow=r"(LDG|STG)\.(?!\S*\.128)", narrow_allowed=0,
    ),
}  # fmt: skip
# Prints what the host asks for: warps and shared memory of a block, and codes per lane and trip of the inner loop. The
# kernels' headers are read as a host compiler sees them, through the emulator's device.h.
SHAPES = """#include <cstdio>
#include "append/append_kernel.cuh"
#include "decode/config.h"
#include "gather/gather_kernel.cuh"
#include "transform/transform_kernel.cuh"
using namespace saw_int4;
static void row(int warps, int shared, int codes) { std::printf("%d %d %d\\n", warps, shared, codes); }
// 8 KV heads, groups of 4, 64 requests
static void plan(int head_dim, int row_tiles, int groups, int per_sm, int per_block) {
  const auto plan = decode_plan({head_dim, 32, 8, 64, 2 * row_tiles, false, groups}, {1, per_sm, per_block});
  row(plan.warps, plan.shared_bytes, token_tiles(head_dim, row_tiles, groups) * head_dim);
}
static void append(int codes, int input_bytes, bool calibrated) {
  row(kAppendThreads / 32, input_bytes + (calibrated ? kCalibrationBytes : 0), codes);
}
int main() {
"""
SHAPE_OF = {
    "decode_merge": "row(kMergeWarps, kMergeWarps * ({0} + kRecordPadding) * 4, {0} / 8);",
    "decode": "plan({0}, {1}, {2}, {per_sm}, {per_block});",
    "append": "append({0} / {1}, AppendShared<{0}, {1}, DType::{2}>::kInputBytes, {4});",
    "gather": "row(kGatherThreads / 32, 0, 2 * {0} / kGatherLanes<{0}>);",
    "transform": "row(kTransformThreads / 32, 0, {0} / kTransformLanes<{0}>);",
}


def fail(text: str) -> None:
    raise SystemExit(f"compile_report: {text}")


def run(command: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        fail(f"{' '.join(command)} failed:\n{done.stderr}")
    return done


def nvdisasm() -> str:
    local = Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin/nvdisasm"
    found = os.environ.get("NVDISASM") or shutil.which("nvdisasm") or (str(local) if local.exists() else None)
    if found is None:
        fail("nvdisasm not found, expected it on PATH, in the triton wheel, or in NVDISASM")
    return found


@dataclass(frozen=True)
class Shape:
    warps: int  # of a block
    shared: int
    codes: int  # per lane and trip of the inner loop

    def resident_warps(self, arch: Arch, registers: int) -> int:
        """Per SM, as registers (dealt out 8 at a time in each quarter), shared memory and warp slots allow."""
        by_registers = 4 * (16384 // (32 * (-(-registers // 8) * 8))) // self.warps
        by_shared = arch.shared_per_sm // (self.shared + RESERVED_PER_BLOCK)
        return self.warps * min(by_registers, by_shared, arch.warps // self.warps)


def shapes(jobs: list[tuple[str, str, tuple]]) -> dict[tuple, Shape]:
    """Of every (arch, op, instances) of jobs, by (arch, op, instance)."""
    keys = [(arch, op, instance) for arch, op, instances in jobs for instance in instances]
    calls = [
        SHAPE_OF[op].format(
            *instance,
            per_sm=ARCHS[arch].shared_per_sm,
            per_block=ARCHS[arch].shared_per_block,
        )
        for arch, op, instance in keys
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "shapes.cpp", Path(folder) / "shapes"
        source.write_text(SHAPES + "\n".join(calls) + "\n}\n")
        flags = ["-std=c++20", "-DSAW_INT4_EMULATE", f"-I{HEADERS}", f"-I{ROOT / 'tests'}"]
        run([os.environ.get("CXX", "c++"), *flags, "-o", str(program), str(source)])
        lines = run([str(program)]).stdout.splitlines()
    return {key: Shape(*map(int, line.split())) for key, line in zip(keys, lines, strict=True)}


@dataclass
class Kernel:
    op: str
    instance: tuple
    arch: str
    registers: int
    stack: int
    spills: int
    code: list[str]  # SASS: "LABEL:" or "OPCODE operands"

    def name(self) -> str:
        return f"{self.op}<{', '.join(str(x).removeprefix('k') for x in self.instance)}>"

    def loop(self) -> list[str]:
        """The shortest body of a backward branch that holds what the loop must; the whole kernel without such a one."""
        needs = OPERATORS[self.op].needs
        labels = {line[:-1]: i for i, line in enumerate(self.code) if line.endswith(":")}
        bodies = []
        for i, line in enumerate(self.code):
            match = re.match(r"BRA.*`\((\.L_x_\d+)\)", line)
            if match and labels.get(match[1], i) < i:
                bodies.append([x for x in self.code[labels[match[1]] : i] if not x.endswith(":")])
        holding = [body for body in bodies if all(any(re.match(need, x) for x in body) for need in needs)]
        return min(holding, key=len, default=[x for x in self.code if not x.endswith(":")])

    def problems(self) -> list[str]:
        expected, loop = OPERATORS[self.op], self.loop()
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} bytes of spills, {self.stack} of stack, expected none")
        if any(re.match("LDL|STL", line) for line in self.code):
            found.append("local memory is used, expected none")
        narrow = [line.split()[0] for line in loop if re.match(expected.narrow, line)]
        if len(narrow) > expected.narrow_allowed:
            found.append(f"narrow accesses {', '.join(sorted(set(narrow)))} in the loop: {len(narrow)}, expected at "
                         f"most {expected.narrow_allowed}")  # fmt: skip
        for need in expected.needs:
            if not any(re.match(need, line) for line in loop):
                found.append(f"no {need} in the loop")
        return found

    def row(self, shape: Shape) -> str:
        loop = self.loop()
        kinds = Counter(x.split()[0] for x in loop if re.match(r"HG?MMA|LDG|STG|LDS|STS|LDL|STL", x))
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return (
            f"{'sm_' + self.arch:8} {self.name():32} {self.registers:4} {self.stack:5} {self.spills:6} "
            f"{shape.shared:7} {shape.resident_warps(ARCHS[self.arch], self.registers):5} {len(loop):6} "
            f"{len(loop) / shape.codes:8.2f}  {kinds}"
        )


TITLE = f"{'arch':8} {'kernel':32} regs stack spills  shared warps  instr per code  of these"


def compile_unit(arch: str, op: str, instances: tuple[tuple, ...]) -> list[Kernel]:
    expected = OPERATORS[op]
    text = f'#include "{expected.header or f"{op}/{op}_kernel.cuh"}"\nnamespace saw_int4 {{\n'
    params = ", ".join(f"const {name}" for name in expected.params.split(", "))
    for instance in instances:
        arguments = ", ".join(f"DType::{x}" if x in DTYPES else str(x) for x in instance)
        text += f"template __global__ void saw_int4_{op}_kernel<{arguments}>({params});\n"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / f"{op}.cu", Path(folder) / f"{op}.cubin"
        source.write_text(text + "}\n")
        command = ["nvcc", *FLAGS, "-Xptxas", "-v", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        log = run([*command, "-o", str(cubin), str(source)]).stderr
        sass = run([nvdisasm(), "-c", str(cubin)]).stdout
    code: dict[str, list[str]] = {}
    current: list[str] = []
    for line in sass.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            current = code.setdefault(match[1], [])
        elif match := re.match(r"(\.L_x_\d+):", line):
            current.append(match[1] + ":")
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            current.append(match[1])
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    kernels = []
    for match in re.finditer(pattern, log, re.DOTALL):
        arguments = re.search(rf"saw_int4_{op}_kernelI((?:L(?:i|b|NS_5DTypeE)\d+E)+)", match[1])
        written = {"i": int, "b": lambda n: ("false", "true")[int(n)], "NS_5DTypeE": lambda n: DTYPES[int(n)]}
        instance = tuple(written[kind](n) for kind, n in re.findall(r"L(i|b|NS_5DTypeE)(\d+)E", arguments[1]))
        kernels.append(Kernel(op, instance, arch, int(match[4]), int(match[2]), int(match[3]), code[match[1]]))
    if len(kernels) != len(instances):
        fail(f"{len(kernels)} kernels of {op} in ptxas' output for sm_{arch}, expected {len(instances)}:\n{log}")
    return sorted(kernels, key=lambda kernel: str(kernel.instance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), choices=list(ARCHS))
    parser.add_argument("--op", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    parser.add_argument("--all", action="store_true", help="every instance, not only the usual ones")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        fail("nvcc not found on PATH")
    jobs = [(arch, op, OPERATORS[op].all if args.all else OPERATORS[op].usual) for arch in args.arch for op in args.op]
    shape_of = shapes(jobs)
    failed = 0
    print(TITLE)
    with ThreadPoolExecutor(args.jobs) as pool:
        for kernels in pool.map(lambda job: compile_unit(*job), jobs):
            for kernel in kernels:
                problems = kernel.problems()
                failed += bool(problems)
                row = kernel.row(shape_of[kernel.arch, kernel.op, kernel.instance])
                print(row + "".join(f"\n    FAILED: {p}" for p in problems), flush=True)
    if failed:
        fail(f"{failed} kernels failed")


if __name__ == "__main__":
    main()
