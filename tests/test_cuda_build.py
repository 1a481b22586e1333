"""What the CUDA kernels are built for, and what nvcc makes of them for every supported GPU, without one."""

import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@needs_nvcc
def test_kernels_compile_without_spills_for_every_architecture():
    """Every decode kernel and the usual others, for each architecture: about four minutes of two cores."""
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


@pytest.fixture
def setup_py(monkeypatch):
    """The names of setup.py, run without building anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("SAW_INT4_NO_EXTENSION", "1")
    return runpy.run_path(str(ROOT / "setup.py"))


def test_architectures_asked_for_are_built_for(setup_py, monkeypatch):
    supported = setup_py["SUPPORTED_ARCHS"]
    for asked in (";".join(supported), " ".join(supported), "9.0a", "8.0;9.0+PTX", "10.0a+PTX 12.1"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        assert setup_py["cuda_archs"]() == asked


@pytest.mark.parametrize("arch", ["8.0+PTX", "8.6+PTX", "8.9+PTX", "12.0+PTX", "7.5", "Ampere"])
def test_architectures_that_would_fail_at_launch_are_refused(setup_py, monkeypatch, arch):
    for asked in (arch, f"9.0a;{arch}", f"{arch} 9.0a"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        with pytest.raises(SystemExit) as refusal:
            setup_py["cuda_archs"]()
        assert f"TORCH_CUDA_ARCH_LIST names '{arch}', expected 8.x to 12.x" in str(refusal.value)
