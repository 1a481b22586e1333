"""What nvcc makes of the CUDA kernels for every supported GPU, without one."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@needs_nvcc
def test_kernels_compile_without_spills_for_every_architecture():
    """The usual instances of each kernel and architecture: two or three minutes of two cores."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/compile_report.py")], capture_output=True, text=True, cwd=ROOT
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
def test_glue_compiles_against_this_torch(tmp_path):
    """A CPU build of torch has every header that the glue needs but one, which cmake writes for a CUDA build: settings
    of the shared library, none of them the glue's business. An empty one stands in.
    """
    torch_headers = Path(torch.__file__).parent / "include"
    generated = "c10/cuda/impl/cuda_cmake_macros.h"
    if not (torch_headers / generated).exists():
        (tmp_path / generated).parent.mkdir(parents=True)
        (tmp_path / generated).touch()
    glue = sorted((ROOT / "csrc").glob("*/*_cuda_op.cpp"))
    assert len(glue) == 4
    source = tmp_path / "glue.cpp"
    source.write_text("".join(f'#include "{path}"\n' for path in glue))
    # Through nvcc, which knows where CUDA's headers are.
    command = [NVCC, "-std=c++20", "-Xcompiler", "-fsyntax-only,-Wall,-Werror", "-DSAW_INT4_WITH_CUDA", "-c"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{tmp_path}"]
    for path in (torch_headers, torch_headers / "torch/csrc/api/include", sysconfig.get_paths()["include"]):
        command += ["-isystem", str(path)]
    done = subprocess.run([*command, "-o", str(tmp_path / "glue.o"), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
