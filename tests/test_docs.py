"""The documents are true: every path, flag and environment variable they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {".venv", ".cache", "build", ".pytest_cache"}
DOCS = sorted(p for p in ROOT.rglob("*.md") if not NOT_OURS & set(p.relative_to(ROOT).parts))
SOURCES = [
    p
    for pattern in ("saw_int4/**/*.py", "scripts/*", "setup.py", "tests/**/*.py", "pyproject.toml")
    for p in ROOT.glob(pattern)
    if p.is_file()
]
TEXT = "\n".join(p.read_text() for p in SOURCES)
PATH = re.compile(r"(?<![\w/.-])((?:scripts|saw_int4|csrc|tests|patches|requirements|docs|benchmarks)/[\w./-]*[\w/])")
OWN_FLAG = re.compile(r"(?<![\w-])(--(?:saw-[a-z-]+|smoke|model|op|sglang))\b")
VARIABLE = re.compile(r"\b(SAW_INT4_[A-Z_]+)\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("doc", DOCS, ids=name_of)
def test_paths_exist(doc):
    text = doc.read_text()
    named = {m[1] for m in PATH.finditer(text) if text[m.end() : m.end() + 1] not in ("<", "*")}  # not a pattern
    assert not {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize("doc", DOCS, ids=name_of)
def test_flags_exist(doc):
    assert not {flag for flag in OWN_FLAG.findall(doc.read_text()) if flag not in TEXT}


@pytest.mark.parametrize("doc", DOCS, ids=name_of)
def test_environment_variables_exist(doc):
    assert not {name for name in VARIABLE.findall(doc.read_text()) if name not in TEXT}
