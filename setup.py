"""Builds saw_int4._C, one torch extension: CPU kernels always, CUDA kernels where torch and nvcc allow it.

Environment:
    SAW_INT4_CPU_ONLY=1      leave the CUDA kernels out even where they could be built
    SAW_INT4_NO_EXTENSION=1  compile nothing: the extension was built in place before (scripts/setup.sh)
    TORCH_CUDA_ARCH_LIST     architectures to build for (default: the GPUs present, else every supported one); +PTX
                             only from 9.0 to 11.x
    MAX_JOBS                 parallel compile jobs
"""

import os
import re
import subprocess
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
SUPPORTED_ARCHS = ["8.0", "8.6", "8.9", "9.0a", "10.0a", "12.0"]
# What may be built for. PTX of an architecture with little shared memory, compiled by the driver on a later GPU with
# much, is bound to half of the threads that the planner launches there (kLargeShared in csrc/common/cuda_thread.h).
BUILDABLE = re.compile(r"(8|12)\.\d[af]?|(9|10|11)\.\d[af]?(\+PTX)?")


def nvcc_version() -> str | None:
    """The nvcc that torch would call, as "13.0", or None."""
    if cpp_extension.CUDA_HOME is None:
        return None
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None


def with_cuda() -> bool:
    """Decide, and say why."""
    if os.environ.get("SAW_INT4_CPU_ONLY") == "1":
        print("saw_int4: CPU kernels only (SAW_INT4_CPU_ONLY=1)")
        return False
    if torch.version.cuda is None:
        print(f"saw_int4: CPU kernels only (torch {torch.__version__} is a CPU build)")
        return False
    found = nvcc_version()
    if found is None:
        print("saw_int4: CPU kernels only (no nvcc; set CUDA_HOME to build the CUDA kernels)")
        return False
    if found.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise SystemExit(
            f"saw_int4: nvcc is {found}, torch {torch.__version__} was built for CUDA {torch.version.cuda}; "
            "their major versions must be equal. Point CUDA_HOME at a matching toolkit, install a torch built "
            "for this one, or set SAW_INT4_CPU_ONLY=1."
        )
    print(f"saw_int4: CPU and CUDA kernels (nvcc {found}, torch {torch.__version__})")
    return True


def cuda_archs() -> str:
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        for arch in re.findall("[^ ;]+", asked):
            if not BUILDABLE.fullmatch(arch):
                raise SystemExit(
                    f"saw_int4: TORCH_CUDA_ARCH_LIST names {arch!r}, expected 8.x to 12.x as numbers, with +PTX from "
                    "9.x to 11.x only: kernels of other PTX do not launch on every later GPU. Name the architecture "
                    f"of each GPU instead, or unset it for the GPUs present, or else {';'.join(SUPPORTED_ARCHS)}."
                )
        return asked
    if torch.cuda.is_available():
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        # The "a" targets hold the instructions of exactly that GPU generation.
        return ";".join(f"{major}.{minor}" + ("a" if major in (9, 10) else "") for major, minor in sorted(present))
    return ";".join(SUPPORTED_ARCHS)


def extension():
    # Bytes of the cache must not depend on the compiler's mood: no contraction, no fast-math.
    cxx = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wno-unknown-pragmas"]
    cuda = with_cuda()
    patterns = ["csrc/*.cpp", "csrc/*/*_cpu*.cpp"] + (["csrc/*/*_cuda*.cu", "csrc/*/*_cuda*.cpp"] if cuda else [])
    sources = sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))
    # torch's C++ runtime by its file, for compilers that bring a static libstdc++ alone: symbols of two versions in one
    # process get mixed, and the first number written to a stream crashes.
    link = ["-fopenmp", "-l:libstdc++.so.6"]
    options = dict(sources=sources, include_dirs=[str(ROOT / "csrc")], extra_link_args=link)
    if not cuda:
        return cpp_extension.CppExtension("saw_int4._C", extra_compile_args={"cxx": cxx}, **options)
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()
    nvcc = ["-O3", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo", "--threads=2"]
    return cpp_extension.CUDAExtension(
        "saw_int4._C",
        extra_compile_args={"cxx": [*cxx, "-DSAW_INT4_WITH_CUDA"], "nvcc": nvcc},
        **options,
    )


setup(
    packages=find_packages(include=["saw_int4", "saw_int4.*"]),
    ext_modules=[] if os.environ.get("SAW_INT4_NO_EXTENSION") == "1" else [extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
)
