"""What the compiler made of the CUDA kernels: registers, spills, occupancy, and the decode loop's instructions.

Needs nvcc and nvdisasm, no GPU. Fails on spills, stack, local memory, narrow bulk accesses or a missing MMA.

    python scripts/compile_report.py                       every kernel, every supported architecture
    python scripts/compile_report.py --arch 90a --op decode
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ["80", "86", "89", "90a", "100a", "120"]
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Icsrc", "-Xptxas", "-v", "-cubin"]
WARPS_PER_SM = {"80": 64, "86": 48, "89": 48, "90a": 64, "100a": 64, "120": 48}
# One translation unit per kernel file: the instantiations that the extension holds, without torch.
DECODE_FILES = sorted((ROOT / "csrc/decode").glob("decode_cuda_*.cu"))
DECODE_UNITS = {path.stem: f'#include "decode/{path.name}"\n' for path in DECODE_FILES}
MOVE_UNIT = """#include "{op}/{op}_dispatch.h"
using Launch = void (*)(const saw_int4::{params}&, saw_int4::Stream);
Launch keep = &saw_int4::{call};
"""
UNITS = {
    "decode": DECODE_UNITS,
    "append": {"append": MOVE_UNIT.format(op="append", params="AppendParams", call="append")},
    "gather": {"gather": MOVE_UNIT.format(op="gather", params="GatherParams", call="gather")},
    "transform": {"transform": MOVE_UNIT.format(op="transform", params="TransformRowsParams", call="transform_rows")},
}
DTYPES = {"0": "fp32", "1": "fp16", "2": "bf16"}
# An operation that moves the bulk of the bytes must exist in this width.
WIDE = {"decode": "LDGSTS.E.BYPASS.LTC128B.128", "append": "LDG.E.128", "gather": "STG.E.128", "transform": "LDG.E.128"}


@dataclass
class Kernel:
    op: str
    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    code: list[str] = field(default_factory=list)  # SASS: "LABEL:" or "OPCODE operands"

    def count(self, prefix: str, code: list[str] | None = None) -> int:
        return sum(line.startswith(prefix) for line in (self.code if code is None else code))

    def loop(self) -> list[str]:
        """The shortest backward branch's body that holds the MMAs."""
        labels = {line[:-1]: i for i, line in enumerate(self.code) if line.endswith(":")}
        best: list[str] = []
        for i, line in enumerate(self.code):
            match = re.match(r"BRA.*`\((\.L_x_\d+)\)", line)
            if match and labels.get(match.group(1), i) < i:
                body = self.code[labels[match.group(1)] : i]
                if any(x.startswith("HMMA") for x in body) and (not best or len(body) < len(best)):
                    best = body
        return [line for line in best if not line.endswith(":")]

    def problems(self) -> list[str]:
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} bytes of spills, {self.stack} of stack, expected none")
        if self.count("LDL") + self.count("STL"):
            found.append("local memory is used, expected none")
        wide = WIDE[self.op]
        if not any(
            line.startswith(wide)
            or line.startswith(wide.replace(".E.", ".E.CONSTANT."))
            or re.match(wide.split(".")[0] + r".*\.128", line)
            for line in self.code
        ):
            found.append(f"no {wide}, expected 16-byte accesses")
        if self.op == "decode" and not self.loop():
            found.append("no loop with an MMA, expected HMMA.16816 in the tile loop")
        return found

    def row(self) -> str:
        blocks = 65536 // (self.registers * 256 or 1)
        warps = min(WARPS_PER_SM[self.arch], blocks * 8)
        text = f"sm_{self.arch:5} {self.name:34} {self.registers:4} regs {self.spills:3} spill {self.stack:3} stack"
        text += f" {warps:3} warps/SM by regs, {sum(not x.endswith(':') for x in self.code):5} instr"
        loop = self.loop() if self.op == "decode" else []
        if loop:
            head_dim = int(re.search(r"<(\d+)", self.name)[1])
            row_tiles = int(re.search(r"<\d+, (\d+)", self.name)[1])
            steps = 2 if row_tiles == 4 else 1  # 16 tokens per trip of its inner loop
            mma = self.count("HMMA", loop)
            expected = 2 * 32 * head_dim
            text += f" | loop {len(loop)} instr, {mma} HMMA, {self.count('LDS', loop)} LDS, "
            text += f"{self.count('MUFU', loop)} MUFU, {32 * len(loop) * steps / expected:.2f} lane-instr per code"
        return text


def nvdisasm() -> str:
    local = Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin/nvdisasm"
    found = os.environ.get("NVDISASM") or shutil.which("nvdisasm") or (str(local) if local.exists() else None)
    if found is None:
        raise SystemExit("compile_report: nvdisasm not found, expected it on PATH, in the triton wheel, or in NVDISASM")
    return found


def readable(mangled: str) -> str:
    match = re.search(r"saw_int4_(\w+?)_kernelILi(\d+)E(?:Li(\d+)E|LNS_5DTypeE(\d)E)", mangled)
    if match is None:
        return mangled
    return f"{match[1]}<{match[2]}, {match[3] or DTYPES[match[4]]}>"


def compile_unit(op: str, stem: str, text: str, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / f"{stem}.cu", Path(folder) / f"{stem}.cubin"
        source.write_text(text)
        command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(cubin), str(source)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"compile_report: {' '.join(command)} failed:\n{done.stderr}")
        sass = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    code: dict[str, list[str]] = {}
    current: list[str] = []
    for line in sass.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            current = code.setdefault(match[1], [])
        elif match := re.match(r"(\.L_x_\d+):", line):
            current.append(match[1] + ":")
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            current.append(match[1])
    kernels = []
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    )
    for match in re.finditer(pattern, done.stderr, re.DOTALL):
        name = match[1]
        kernels.append(Kernel(op, readable(name), arch, int(match[4]), int(match[2]), int(match[3]), code[name]))
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--op", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    jobs = [(op, stem, text, arch) for arch in args.arch for op in args.op for stem, text in sorted(UNITS[op].items())]
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for kernels in pool.map(lambda job: compile_unit(*job), jobs):
            for kernel in sorted(kernels, key=lambda k: k.name):
                problems = kernel.problems()
                failed += bool(problems)
                print(kernel.row() + "".join(f"\n    FAILED: {p}" for p in problems), flush=True)
    if failed:
        sys.exit(f"compile_report: {failed} kernels failed")


if __name__ == "__main__":
    main()
