"""patches/ on the real SGLang: a copy of the installed package, so that the environment stays as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ARGS, CALIBRATED, POOL_TOKENS
from server import ROOT, Server, environment

from saw_int4 import patching
from saw_int4.patching import State
from saw_int4.sglang_plugin import register

pytestmark = pytest.mark.both_versions
PATCHES = ROOT / "patches"
NO_PLUGIN = "saw_int4_cpu"  # SGLANG_PLUGINS: the platform that runs on plain CPU, and nothing else


@pytest.fixture(scope="module")
def installed() -> patching.Tree:
    return patching.find_sglang()


@pytest.fixture(scope="module")
def series(installed) -> patching.Series:
    return patching.pick_series(PATCHES, installed)


def script(action: str, root: Path) -> str:
    """What scripts/apply_patches.py says, or why it refuses."""
    command = [sys.executable, ROOT / "scripts/apply_patches.py", f"--{action}", "--sglang", root]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == (1 if run.stderr else 0), run.stderr
    return run.stderr or run.stdout


def touched_files(installed, series, folder: Path) -> patching.Tree:
    """A package with the files that the series touches, and nothing else."""
    root = folder / "sglang"
    for path in [*series.hunks, "version.py", "_version.py"]:
        if (installed.root / path).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(installed.root / path, root / path)
    return patching.find_sglang(root)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_series_has_the_plugins_seams(installed, series, monkeypatch):
    """Red when the plugin's seams changed: python patches/generate.py writes the series again."""
    monkeypatch.syspath_prepend(str(PATCHES))
    import generate

    folder = PATCHES / f"sglang-{series.version}"
    assert generate.compose(installed.root) == {p.name: p.read_text() for p in sorted(folder.iterdir())}


def test_there_and_back(installed, series, tmp_path):
    tree = touched_files(installed, series, tmp_path)
    before = files(tree.root)
    assert script("check", tree.root).startswith("unpatched: SGLang")
    assert script("apply", tree.root).startswith("patched: SGLang")
    after = files(tree.root)
    assert script("apply", tree.root).endswith("as it was before\n")
    assert script("check", tree.root).startswith("patched: SGLang")
    assert files(tree.root) == after
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == set(series.hunks)
    assert script("revert", tree.root).startswith("unpatched: SGLang")
    assert files(tree.root) == before


def test_a_modified_tree_is_refused(installed, series, tmp_path):
    tree = touched_files(installed, series, tmp_path)
    path = "srt/managers/scheduler.py"
    (tree.root / path).write_bytes((tree.root / path).read_bytes() + b"# mine\n")
    before = files(tree.root)
    for action in ("check", "apply", "revert"):
        assert f"{path}: changed since SGLang {series.version} was installed" in script(action, tree.root)
    assert files(tree.root) == before


def test_git_applies_the_same_patches(installed, series, tmp_path):
    tree = touched_files(installed, series, tmp_path / "python")  # as in SGLang's repository
    patches = sorted((PATCHES / f"sglang-{series.version}").glob("*.patch"))
    subprocess.run(["git", "apply", "-p1", *patches], cwd=tmp_path, check=True, env={**os.environ, "GIT_DIR": "none"})
    assert patching.known_state(tree, series) is State.PATCHED


# ---- a whole package, running --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patched(installed, tmp_path_factory) -> Path:
    """A folder for PYTHONPATH that holds a patched copy of the installed SGLang."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(installed.root, site / "sglang")
    script("apply", site)
    return site


def path_with(site: Path) -> str:
    return os.pathsep.join([str(site), str(ROOT)])


def doctor(site: Path, **env: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "saw_int4.cli", "doctor"]
    run = subprocess.run(
        command, env=environment(**env) | {"PYTHONPATH": path_with(site)}, cwd=site, capture_output=True, text=True
    )
    return run.returncode, run.stdout + run.stderr[-3000:]


def test_serves_without_the_plugin(patched, model, logs, int4_server, text_ids):
    """Same bits as the plugin's server, and every seam is SGLang's own source."""
    server = Server(
        model,
        logs / "patched.log",
        *ARGS,
        *("--kv-cache-dtype", "int4", "--max-total-tokens", str(POOL_TOKENS)),
        command=[sys.executable, "-m", "saw_int4.launch_server"],
        **CALIBRATED,
        HOME=str(logs),  # the artifact of the other server
        PYTHONPATH=path_with(patched),
        SGLANG_PLUGINS=NO_PLUGIN,
    )
    try:
        server.ready()
        started = re.search(r"saw_int4: serving \[(.*)\], .*, seams (.*)", server.text())
        assert started and started[2] == "patched"
        assert server.state()["kv_cache_format"]["format"] == started[1]
        ids = text_ids[1000:1300]
        for each in (server, int4_server):
            each.flush()
        assert server.prompt_logprobs(ids) == int4_server.prompt_logprobs(ids)
        answers = [each.generate(ids, 16)["output_ids"] for each in (server, int4_server)]
        assert answers[0] == answers[1]
    finally:
        server.stop()


def test_with_the_plugin_nothing_is_applied_twice(patched):
    code, said = doctor(patched)
    assert code == 0, said
    seams = re.findall(r"^ok +seam +(\S+): (\w+)$", said, re.M)
    assert dict(seams) == dict.fromkeys(register.hooks(), "patched"), said
    assert str(patched / "sglang") in said


def test_a_half_patched_tree_refuses_int4(patched, installed):
    path = "srt/managers/scheduler.py"
    whole = (patched / "sglang" / path).read_bytes()
    try:
        shutil.copy2(installed.root / path, patched / "sglang" / path)
        assert "Finish it with --apply, or undo it with --revert" in script("check", patched)
        code, said = doctor(patched, SGLANG_PLUGINS=NO_PLUGIN)
        assert code == 1
        for name in ("__init__", "get_internal_state"):
            assert f"the seam on SGLang's sglang.srt.managers.scheduler.Scheduler.{name} is missing" in said
        assert said.count(" is missing") == 2
    finally:
        (patched / "sglang" / path).write_bytes(whole)


def test_without_saw_int4_sglang_is_as_it_was(patched):
    code = f"""
import importlib.util, sys
shim = importlib.util.spec_from_file_location("shim", {str(ROOT / "saw_int4/torchvision_compat.py")!r})
module = importlib.util.module_from_spec(shim)
shim.loader.exec_module(module)
module.define_missing_operators()
sys.modules["saw_int4"] = None  # as if it were not installed
import sglang
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.arg_groups.resolution_hooks import _HOOKS
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
from sglang.srt.server_args import ServerArgs
from typing import get_type_hints
print(sglang.__file__)
assert "saw_int4" not in ATTENTION_BACKEND_CHOICES and "saw_int4" not in ATTENTION_BACKENDS and not _HOOKS
arg = get_type_hints(ServerArgs, include_extras=True)["kv_cache_dtype"].__metadata__[0]
assert "int4" not in arg.choices and "bf16" in arg.choices
assert not hasattr(configure_kv_cache_dtype, "__wrapped__")
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(SGLANG_PLUGINS="none") | {"PYTHONPATH": str(patched)},
        cwd=patched,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith(str(patched))
