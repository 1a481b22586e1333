"""Knowledge flows one way: format -> kernels -> torch operators -> SGLang."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
PYTHON = sorted((ROOT / "saw_int4").rglob("*.py"))
PLUGIN = ROOT / "saw_int4" / "sglang_plugin"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", CSRC, ids=name_of)
def test_csrc_knows_neither_sglang_nor_python(path):
    assert "sglang" not in path.read_text().lower()
    if path.name != "module.cpp":
        python = [i for i in includes(path) if "pybind" in i or i == "Python.h" or i == "torch/extension.h"]
        assert python == []


@pytest.mark.parametrize("path", [p for p in CSRC if p.suffix == ".cuh" or p.parent.name == "common"], ids=name_of)
def test_device_code_knows_no_torch(path):
    assert [i for i in includes(path) if i.startswith(("torch/", "ATen/", "c10/"))] == []


@pytest.mark.parametrize("path", [p for p in CSRC if p.parent.name != "common"], ids=name_of)
def test_inline_assembly_lives_in_the_intrinsics_layer(path):
    assert not re.search(r"\basm\b", path.read_text())


@pytest.mark.parametrize("path", [p for p in PYTHON if PLUGIN not in p.parents], ids=name_of)
def test_only_the_plugin_imports_sglang(path):
    roots = {module.split(".")[0] for module in imported_modules(path)}
    assert "sglang" not in roots


def test_operators_do_not_know_the_plugin():
    for name in ("format.py", "ops.py", "reference.py"):
        modules = imported_modules(ROOT / "saw_int4" / name)
        assert not [m for m in modules if m.startswith("saw_int4.sglang_plugin")], name


def test_no_folder_shadows_sglang():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in tracked.splitlines() if "sglang" in Path(line).parts[:-1]]


def test_importing_the_package_touches_neither_cuda_nor_sglang():
    code = "import sys, saw_int4; print(sorted({'torch', 'sglang', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
