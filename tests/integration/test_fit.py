"""``saw-int4 doctor`` on the real SGLang: all is well here, and what is broken on purpose is found."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import subprocess
import sys
from types import FunctionType

import pytest
from server import ROOT, environment

from saw_int4 import env
from saw_int4.finding import BROKEN, OK
from saw_int4.sglang_plugin import fit, native, register, sizing, verify, workspaces

pytestmark = pytest.mark.both_versions


def problems() -> list[str]:
    return [f"{finding.subject}: {finding.text}" for finding in fit.findings() if finding.level != OK]


def test_as_a_command(model):
    command = [sys.executable, "-m", "saw_int4.cli", "doctor", "--model", str(model), "--enable-lmcache"]
    run = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout
    assert f"sglang      {verify.sglang_version()} at" in run.stdout
    assert "1 broken, 0 warnings" in run.stdout
    assert "refused: --kv-cache-dtype int4 and --enable-lmcache True: not supported together" in run.stdout


def test_a_model_that_is_served(model):
    list(fit.findings())
    served, text = fit.dry_run(["--model-path", str(model), "--kv-cache-dtype", "int4"])
    assert served, text
    assert text.startswith("int4 v2: head_dim 64")
    assert text.endswith("attention backend saw_int4")


def test_nothing_is_calibrated(model, monkeypatch):
    def artifact_for(*_):
        raise AssertionError("calibrates")

    monkeypatch.setattr("saw_int4.calibration.automatic.artifact_for", artifact_for)
    monkeypatch.delenv(env.CALIBRATION, raising=False)
    served, text = fit.dry_run(["--model-path", str(model), "--kv-cache-dtype", "int4"])
    assert served and "calibrated when it is first served" in text
    assert env.CALIBRATION not in os.environ


def test_flags_that_sglang_does_not_know(model):
    assert fit.dry_run(["--model-path", str(model), "--no-such-flag"]) == (
        False,
        "by SGLang's parser, as printed above",
    )


def test_all_is_well():
    assert problems() == []


def test_every_seam_is_reported():
    told = [finding.text.split(":")[0] for finding in fit.findings() if finding.subject == "seam"]
    assert told == list(register.hooks())


@pytest.mark.parametrize("path", fit.OVERRIDES)
def test_every_override_is_watched(path):
    """A method that replaces one of SGLang's belongs into fit.OVERRIDES."""
    cls = pkgutil.resolve_name(path)
    theirs = [base for base in cls.__mro__[1:] if base.__module__.startswith("sglang.")]
    ours = [
        name for name, value in vars(cls).items() if isinstance(value, FunctionType | property) and name[:2] != "__"
    ]
    assert sorted(fit.OVERRIDES[path]) == sorted(n for n in ours if any(n in vars(base) for base in theirs))


@pytest.mark.parametrize(
    ("cls", "read"),
    [
        ("sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator", r"\bkvc\.(\w+)"),
        ("sglang.srt.configs.model_config.ModelConfig", r"\bkvc\.model_config\.(\w+)"),
    ],
)
def test_what_sizing_reads_is_watched(cls, read):
    source = inspect.getsource(sizing) + inspect.getsource(workspaces)
    assert set(re.findall(read, source)) <= set(fit.READS[cls])


def test_missing_hook(monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    list(fit.findings())  # loads the plugins
    target = next(iter(register.hooks()))
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target})
    assert problems() == [f"plugin: the seam on SGLang's {target} is missing"]


def test_seam_that_is_patched_and_hooked(monkeypatch):
    list(fit.findings())
    target = next(iter(register.hooks()))
    monkeypatch.setattr(native, "is_seam", lambda seam: seam == target)
    assert problems() == [f"plugin: the seam on SGLang's {target} is there twice"]


def test_seam_with_another_signature(monkeypatch):
    from sglang.srt.managers.scheduler import Scheduler

    list(fit.findings())
    monkeypatch.setattr(Scheduler, "get_internal_state", lambda self: None)
    [problem] = problems()
    assert "get_internal_state: takes (self), expected (self, recv_req)" in problem


def test_renamed_names(monkeypatch):
    monkeypatch.setitem(fit.READS, "sglang.srt.mem_cache.memory_pool.ReqToTokenPool", ("req_to_token", "gone"))
    monkeypatch.setitem(fit.READS, "sglang.srt.mem_cache.memory_pool.NoPool", ("x",))
    monkeypatch.setitem(fit.OVERRIDES, "saw_int4.sglang_plugin.pool.Int4KVPool", ("rows",))  # not SGLang's
    found = problems()
    assert len(found) == 3
    assert "MHATokenToKVPool has no rows any more: nothing calls ours" in found[0]
    assert "ReqToTokenPool has no gone" in found[1]
    assert "NoPool" in found[2]


def test_untested_version(monkeypatch):
    list(fit.findings())
    monkeypatch.setattr(fit, "sglang_version", lambda: "0.9.9")
    [problem] = [text for text in problems() if "refusals" not in text]
    assert problem.startswith("sglang: 0.9.9 at")
    assert "tested are 0.5.21, 0.5.23" in problem


def test_module_that_cannot_be_imported(monkeypatch):
    def failing(name):
        if name.endswith(".prefill"):
            raise ImportError("cannot import name 'gone'")

    monkeypatch.setattr(fit.importlib, "import_module", failing)
    found = [finding for finding in fit.findings() if finding.level == BROKEN]
    assert [finding.text for finding in found] == [
        "saw_int4.sglang_plugin.prefill: ImportError: cannot import name 'gone'"
    ]
    assert found[0].hint


@pytest.mark.parametrize(
    ("function", "wrapper", "fits"),
    [
        (lambda self, a, b: 0, lambda original, self, a, b: 0, True),
        (lambda self, a: 0, lambda original, self, a, b: 0, False),
        (lambda self, a, b, c: 0, lambda original, self, a, b: 0, False),  # the wrapper would refuse c
        (lambda self, b, a: 0, lambda original, self, a, b: 0, False),
        (lambda self, a, *, b, c: 0, lambda original, self, a, *args, **kwargs: 0, True),
        (lambda self, x: 0, lambda original, self, a, *args, **kwargs: 0, False),
    ],
)
def test_signatures(function, wrapper, fits):
    assert (fit.mismatch(function, wrapper) is None) is fits


def test_expected_keyword():
    def build_pool(original, self, **kwargs):
        pass

    assert fit.mismatch(lambda self, *, mha_pool_class, size: 0, build_pool) is None
    assert "expected mha_pool_class" in fit.mismatch(lambda self, *, pool_class: 0, build_pool)
