"""Compiles the emulator's libraries with the host's C++ compiler, each object once per content of its sources."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / ".cache" / "emulator"
CORE = ["fiber.cpp", "shared_memory.cpp", "global_memory.cpp", "machine.cpp"]
TORCH = Path(torch.__file__).parent
# No contraction: the bytes of the cache must be those of the CPU operators.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi",
         "-DSAW_INT4_EMULATE"]  # fmt: skip
PROJECT_INCLUDES = [ROOT / "csrc", ROOT / "tests"]
SYSTEM_INCLUDES = [TORCH / "include", TORCH / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        raise RuntimeError("emulator: no C++ compiler found, expected g++ or c++ on PATH, or one named by CXX")
    return found


@functools.cache
def compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def project_files(source: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """The source and every file of this project that it includes, with their contents."""
    if source in seen:
        return seen
    seen[source] = source.read_bytes()
    for name in INCLUDE.findall(seen[source].decode()):
        for folder in (source.parent, *PROJECT_INCLUDES):
            if (folder / name).is_file():
                project_files((folder / name).resolve(), seen)
                break
    return seen


def digest(*parts: bytes) -> str:
    joined = hashlib.sha256()
    for part in parts:
        joined.update(hashlib.sha256(part).digest())
    return joined.hexdigest()[:24]


def compile_object(source: Path, module: str) -> Path:
    flags = [*FLAGS, f"-DSAW_INT4_MODULE={module}"]
    contents = project_files(source, {})
    key = digest(
        compiler_version().encode(),
        " ".join(flags).encode(),
        torch.__version__.encode(),
        *(part for path in sorted(contents) for part in (str(path.relative_to(ROOT)).encode(), contents[path])),
    )
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        includes = [f"-I{path}" for path in PROJECT_INCLUDES] + [f"-isystem{path}" for path in SYSTEM_INCLUDES]
        part = target.with_suffix(".part")
        run([compiler(), *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(part)])
        part.rename(target)
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"emulator: {' '.join(command)} failed with exit code {done.returncode}:\n{done.stderr}")


@functools.cache
def load_library(module: str, sources: tuple[Path, ...], link_torch: bool = False) -> ModuleType:
    """Import the extension module made of the emulator's core and ``sources``, compiled if need be.

    Raises:
        RuntimeError: there is no compiler, or a source does not compile.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = min(2, int(os.environ.get("MAX_JOBS", "2")))
        with ThreadPoolExecutor(jobs) as pool:
            everything = [*(HERE / name for name in CORE), *sources]
            objects = list(pool.map(lambda source: compile_object(source.resolve(), module), everything))
        key = digest(*(path.name.encode() for path in objects))
        library = CACHE / f"{module}-{key}.so"
        if not library.exists():
            torch_flags = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
            torch_flags += ["-ltorch_python"]
            part = library.with_suffix(".part")
            run([compiler(), "-shared", *map(str, objects), *(torch_flags if link_torch else []), "-o", str(part)])
            part.rename(library)
    # The key, as of one full name pybind11 would return the same module again.
    spec = importlib.util.spec_from_file_location(f"{key}.{module}", library)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"emulator: {library} cannot be imported")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
