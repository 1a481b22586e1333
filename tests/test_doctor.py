"""``saw-int4 doctor`` without SGLang: torch, devices, extension, options. With it: tests/integration/test_fit.py."""

from types import SimpleNamespace

import pytest
import torch

from saw_int4 import _C, cli, doctor, env
from saw_int4.finding import BROKEN, NOTE, OK, WARNING, Finding


@pytest.fixture(autouse=True)
def no_sglang(monkeypatch):
    monkeypatch.setattr(doctor, "_sglang", lambda model, flags: iter(()))
    for name in (env.ROTATION, env.ROTATION_ORDER, "HADAMARD", "HADAMARD_ORDER", "ROTATE_V"):
        monkeypatch.delenv(name, raising=False)


def broken(**_) -> list[Finding]:
    return [finding for finding in doctor.findings() if finding.level == BROKEN]


def test_all_well(capsys):
    assert doctor.main(None, []) == 0
    said = capsys.readouterr().out
    for text in (torch.__version__, _C.cpu_isa(), "int4 v2: head_dim 64", "0 broken, 0 warnings"):
        assert text in said


def test_a_hint_stands_under_its_finding():
    assert str(Finding(BROKEN, "torch", "is gone", "install it")).splitlines() == [
        "broken   torch       is gone",
        "                     hint: install it",
    ]


@pytest.mark.parametrize(("levels", "code"), [([OK, NOTE, WARNING], 0), ([OK, BROKEN, OK], 1)])
def test_exit_code(monkeypatch, capsys, levels, code):
    found = [Finding(level, "subject", "text") for level in levels]
    monkeypatch.setattr(doctor, "findings", lambda model, flags: iter(found))
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == code
    assert f"{levels.count(BROKEN)} broken, {levels.count(WARNING)} warnings" in capsys.readouterr().out


def test_flags_of_sglang_go_through(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda model, flags: iter([Finding(OK, str(model), " ".join(flags))]))
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--model", "M", "--tp-size", "2"])
    assert "M           --tp-size 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["format", "--head-dim", "64", "--tp-size", "2"])
    assert "unrecognized arguments: --tp-size 2" in capsys.readouterr().err


def test_extension_that_cannot_be_loaded(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "saw_int4._C", None)
    monkeypatch.delattr("saw_int4._C")
    [finding] = broken()
    assert finding.subject == "extension"
    assert "cannot be loaded" in finding.text
    assert "pip install" in finding.hint


@pytest.mark.parametrize("damage", ["version", "schema", "bytes"])
def test_extension_that_does_not_fit(monkeypatch, damage):
    from saw_int4 import format, ops

    if damage == "version":
        monkeypatch.setattr(format, "FORMAT_VERSION", format.FORMAT_VERSION + 1)
    elif damage == "schema":
        monkeypatch.setattr(ops, "append_kv", lambda *args, **kwargs: torch.ops.saw_int4.append_kv(*args, new_option=1))
    else:
        monkeypatch.setattr(ops, "append_kv", lambda *args, **kwargs: None)  # rows stay as they were
    [finding] = broken()
    assert finding.subject == "extension"
    assert "a trial failed" in finding.text


@pytest.mark.parametrize(("capability", "ok"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus(monkeypatch, capability, ok):
    gpu = SimpleNamespace(name="GPU X", major=capability[0], minor=capability[1], total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = {finding.subject: finding for finding in doctor.findings()}
    assert f"cuda:0 GPU X, sm_{capability[0]}{capability[1]}, 80 GiB" in found["device"].text
    assert (found["device"].level == OK) is ok
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("saw_int4::append_kv", "CUDA")
    assert (found["extension"].level == OK) is has_kernels


def test_options(monkeypatch):
    monkeypatch.setenv(env.ROTATION, "sideways")
    [finding] = broken()
    assert finding.subject == "format"
    assert "sideways" in finding.text
