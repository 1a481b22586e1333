"""The applier of patches/, on trees of its own. The real SGLang: tests/integration/test_patched_sglang.py."""

import difflib
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw_int4 import patching, unified_diff
from saw_int4.patching import State
from saw_int4.unified_diff import PatchError

ROOT = Path(__file__).resolve().parent.parent
VERSION = "1.2.3"
BEFORE = {
    "srt/a.py": "import os\n\n\ndef f():\n    return 1\n",
    "srt/deep/b.py": "".join(f"line {i}\n" for i in range(40)),
    "srt/last_line.py": "no newline follows",
}
AFTER = {
    "srt/new.py": "def seam(f):\n    return f\n",
    "srt/a.py": "import os\nfrom srt.new import seam\n\n\n@seam\ndef f():\n    return 1\n",
    "srt/deep/b.py": "first\n" + BEFORE["srt/deep/b.py"].replace("line 20\n", "twenty\nand more\n"),
    "srt/last_line.py": "a newline follows\nno newline follows",
}
NL, NO_NEWLINE = "\n", "\n\\ No newline at end of file\n"


def unified(path: str, old: str | None, new: str) -> str:
    full = unified_diff.REPOSITORY_PREFIX + path
    lines = (text.splitlines(keepends=True) for text in (old or "", new))
    diff = difflib.unified_diff(*lines, "/dev/null" if old is None else f"a/{full}", f"b/{full}")
    return "why\n\n" + "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff
    )


@pytest.fixture
def patches(tmp_path) -> Path:
    folder = tmp_path / "patches" / f"sglang-{VERSION}"
    folder.mkdir(parents=True)
    files = {}
    for number, (path, new) in enumerate(AFTER.items()):
        old = BEFORE.get(path)
        (folder / f"{number:04d}.patch").write_text(unified(path, old, new))
        files[path] = {"before": old and patching.digest(old.encode()), "after": patching.digest(new.encode())}
    (folder / "manifest.json").write_text(json.dumps(files))
    return folder.parent


@pytest.fixture
def root(tmp_path) -> Path:
    """A package like SGLang's."""
    package = tmp_path / "site-packages" / "sglang"
    for path, text in {**BEFORE, "version.py": "", "_version.py": f"__version__ = version = '{VERSION}'\n"}.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    return package


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file() and "version" not in p.name}


def open_both(patches: Path, root: Path):
    tree = patching.find_sglang(root)
    return tree, patching.pick_series(patches, tree)


def test_apply_and_revert(patches, root):
    tree, series = open_both(patches, root)
    assert tree.version == VERSION
    assert patching.known_state(tree, series) is State.UNPATCHED
    assert patching.apply(tree, series)
    assert contents(root) == AFTER
    assert patching.known_state(tree, series) is State.PATCHED
    assert not patching.apply(tree, series)  # once is enough
    assert contents(root) == AFTER
    assert patching.revert(tree, series)
    assert contents(root) == BEFORE
    assert not patching.revert(tree, series)


@pytest.mark.parametrize("path", ["srt/a.py", "srt/deep/b.py", "srt/new.py"])
@pytest.mark.parametrize("patched_first", [False, True])
def test_a_changed_file_is_refused_and_nothing_is_written(patches, root, path, patched_first):
    tree, series = open_both(patches, root)
    if patched_first:
        patching.apply(tree, series)
    (root / path).write_text("mine\n")
    found = contents(root)
    for action in (patching.apply, patching.revert):
        with pytest.raises(PatchError, match=f"{path}: changed since SGLang {VERSION}"):
            action(tree, series)
    assert contents(root) == found


def test_a_missing_file_is_refused(patches, root):
    (root / "srt/a.py").unlink()
    with pytest.raises(PatchError, match=r"srt/a\.py: changed since"):
        patching.apply(*open_both(patches, root))


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("step", range(4))
def test_a_failure_half_way_leaves_no_trace(patches, root, monkeypatch, action, step):
    tree, series = open_both(patches, root)
    if action == "revert":
        patching.apply(tree, series)
    found, calls, commit = contents(root), [], patching._commit

    def failing(file, content):
        calls.append(file)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        commit(file, content)

    monkeypatch.setattr(patching, "_commit", failing)
    with pytest.raises(KeyboardInterrupt):
        getattr(patching, action)(tree, series)
    assert contents(root) == found


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("then", ["apply", "revert"])
def test_a_killed_run_is_recognised_and_finished_or_undone(patches, root, action, step, then):
    tree, series = open_both(patches, root)
    if action == "revert":
        patching.apply(tree, series)
    killed = f"""
import os, sys
from pathlib import Path
from saw_int4 import patching
commit, calls = patching._commit, []
def dying(file, content):
    if len(calls) == {step}:
        os._exit(9)
    calls.append(file)
    commit(file, content)
patching._commit = dying
tree = patching.find_sglang(Path({str(root)!r}))
patching.{action}(tree, patching.pick_series(Path({str(patches)!r}), tree))
"""
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == 9
    start = State.UNPATCHED if action == "apply" else State.PATCHED
    assert patching.known_state(tree, series) is (State.INTERRUPTED if step else start)
    if step and action == "apply":
        assert "srt/new.py" in contents(root), "others import it: it must be there first"
    getattr(patching, then)(tree, series)
    assert contents(root) == (AFTER if then == "apply" else BEFORE)


def test_files_are_replaced_not_written_to(patches, root, tmp_path):
    """Package caches share files by hard links."""
    shared = tmp_path / "cache.py"
    os.link(root / "srt/a.py", shared)
    (root / "srt/a.py").chmod(0o640)
    patching.apply(*open_both(patches, root))
    assert shared.read_text() == BEFORE["srt/a.py"]
    assert (root / "srt/a.py").stat().st_mode & 0o777 == 0o640


def test_one_run_at_a_time(patches, root):
    tree, series = open_both(patches, root)
    handle = os.open(root, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(PatchError, match="another run"):
        patching.apply(tree, series)
    os.close(handle)
    assert patching.apply(tree, series)


def test_a_series_that_was_tampered_with(patches, root):
    patch = patches / f"sglang-{VERSION}" / "0001.patch"
    patch.write_text(patch.read_text().replace("+@seam", "+@steam"))
    with pytest.raises(PatchError, match="gives other bytes than manifest.json"):
        patching.apply(*open_both(patches, root))
    assert contents(root) == BEFORE
    patch.unlink()
    with pytest.raises(PatchError, match="names other files than the patches"):
        open_both(patches, root)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no diff\n", "a unified diff of one file"),
        ("--- a/x\n+++ b/etc/passwd\n", "expected a file under python/sglang/"),
        ("--- a/x\n+++ b/python/sglang/../../x\n", "expected a file under python/sglang/"),
        ("--- a/x\n+++ b/python/sglang/x\n@@ nonsense @@\n", "expected the head of a hunk"),
        ("--- a/x\n+++ b/python/sglang/x\n@@ -1,2 +1 @@\n-a\n+b\n", "expected 2 old and 1 new"),
        ("--- a/x\n+++ b/python/sglang/x\n@@ -1 +1 @@\n-a\n*b\n", "expected 1 old and 1 new lines"),
        ("--- a/x\n+++ b/python/sglang/x\n@@ -1 +1,2 @@\n-a\n-b\n+c\n+d\n", "its head says"),
    ],
)
def test_malformed_patches(text, said):
    with pytest.raises(PatchError, match=said):
        unified_diff.parse("p.patch", text.encode())


def test_hunks_never_move():
    _, hunks = unified_diff.parse("p.patch", unified("srt/a.py", "a\nb\nc\n", "a\nB\nc\n").encode())
    with pytest.raises(PatchError, match="are not those of the patch"):
        unified_diff.patched("srt/a.py", b"new line\na\nb\nc\n", hunks)


text_files = st.lists(st.sampled_from(["", "a", "b", "c", "-- d", "++ e", "@@ f"]), max_size=30).map(
    lambda lines: "".join(line + "\n" for line in lines)
)


@settings(max_examples=200, deadline=None)
@given(text_files, text_files, st.integers(0, 4))
def test_any_diff_there_and_back(old, new, context):
    full = unified_diff.REPOSITORY_PREFIX + "x"
    lines = (text.splitlines(keepends=True) for text in (old, new))
    diff = "".join(difflib.unified_diff(*lines, f"a/{full}", f"b/{full}", n=context))
    if not diff:
        return
    _, hunks = unified_diff.parse("p.patch", diff.encode())
    assert unified_diff.patched("x", old.encode(), hunks) == new.encode()
    assert unified_diff.patched("x", new.encode(), hunks, reverse=True) == old.encode()


# ---- which tree, which series -------------------------------------------------------------------------------------


def test_trees_are_found(patches, root, tmp_path):
    checkout = tmp_path / "checkout" / "python"
    checkout.mkdir(parents=True)
    root.rename(checkout / "sglang")
    (checkout / "sglang" / "_version.py").unlink()
    for path in (checkout.parent, checkout, checkout / "sglang"):
        tree = patching.find_sglang(path)
        assert tree == patching.Tree((checkout / "sglang").resolve(), None)
    assert patching.pick_series(patches, tree).version == VERSION  # by its files
    (checkout / "sglang" / "srt/a.py").write_text("mine\n")
    with pytest.raises(PatchError, match="git apply"):
        patching.pick_series(patches, tree)
    with pytest.raises(PatchError, match="holds no SGLang"):
        patching.find_sglang(tmp_path)


def test_an_unknown_version_is_refused(patches, root):
    (root / "_version.py").write_text("__version__ = version = '9.9.9'\n")
    with pytest.raises(PatchError, match=f"is SGLang 9.9.9, there are patches for {VERSION}"):
        open_both(patches, root)


def test_command_line(root):
    script = [sys.executable, str(ROOT / "scripts/apply_patches.py"), "--check", "--sglang"]
    for path, said in ((root, "is SGLang 1.2.3, there are patches for 0.5.21, 0.5.23"), (ROOT, "holds no SGLang")):
        run = subprocess.run([*script, str(path)], capture_output=True, text=True)
        assert run.returncode == 1
        assert said in run.stderr


# ---- the series that we ship ---------------------------------------------------------------------------------------

SERIES = sorted((ROOT / "patches").glob("sglang-*"))


@pytest.mark.parametrize("folder", SERIES, ids=lambda p: p.name)
def test_shipped_series_are_readable_and_in_the_ledger(folder):
    series = patching.read_series(folder)
    ledger = (ROOT / "patches" / "README.md").read_text()
    for path in series.hunks:
        assert f"`{path}`" in ledger, f"patches/README.md does not say why {path} is patched"


def test_every_tested_sglang_has_a_series():
    from saw_int4.sglang_plugin.names import TESTED_SGLANG

    assert [folder.name for folder in SERIES] == [f"sglang-{version}" for version in sorted(TESTED_SGLANG)]
