"""Options: defaults, parsing, the published fork's variables, contradictions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saw_int4 import env, launch_server

pytestmark = pytest.mark.both_versions


@pytest.mark.parametrize(
    ("environ", "rotation", "order"),
    [
        ({}, "auto", None),
        ({"SAW_INT4_ROTATION": "kv", "SAW_INT4_ROTATION_ORDER": "32"}, "kv", 32),
        ({"SAW_INT4_ROTATION": "none"}, "none", None),
        ({"SAW_INT4_ROTATION_ORDER": "head_dim"}, "auto", None),
        ({"HADAMARD": "1"}, "k", None),
        ({"HADAMARD": "1", "HADAMARD_ORDER": "16"}, "k", 16),
        ({"HADAMARD": "1", "ROTATE_V": "1", "HADAMARD_ORDER": "64"}, "kv", 64),
        ({"ROTATE_V": "true"}, "kv", None),
        ({"HADAMARD": "0"}, "none", None),
        ({"HADAMARD": "0", "HADAMARD_ORDER": "16"}, "none", None),
        ({"HADAMARD": "1", "SAW_INT4_ROTATION": "k"}, "k", None),
        ({"SGLANG_FUSE_HADAMARD_INT4_KV": "0"}, "auto", None),
    ],
)
def test_resolve(environ, rotation, order):
    options, notes = env.resolve(environ)
    assert (options.rotation, options.order) == (rotation, order)
    aliases = [name for name in environ if not name.startswith("SAW_")]
    for alias in aliases:
        assert any(alias in note for note in notes), (alias, notes)
    assert bool(notes) == bool(aliases)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"SAW_INT4_ROTATION": "q"}, "expected one of auto, none, k, kv"),
        ({"SAW_INT4_ROTATION_ORDER": "48"}, "power of two"),
        ({"SAW_INT4_ROTATION_ORDER": "many"}, "power of two"),
        ({"SAW_INT4_ROTATION": "none", "SAW_INT4_ROTATION_ORDER": "16"}, "Leave one of them out"),
        ({"SAW_INT4_ROTATION": "none", "HADAMARD": "1"}, "Unset one of them"),
        ({"SAW_INT4_ROTATION_ORDER": "64", "HADAMARD_ORDER": "16"}, "Unset one of them"),
        ({"HADAMARD": "0", "ROTATE_V": "1"}, "contradict"),
        ({"HADAMARD": "perhaps"}, "expected 1 or 0"),
        ({"SAW_INT4_GROUPS": "4"}, r"SAW_INT4_GROUPS \(--saw-groups\) is 4, expected 1 or 2"),
        ({"SAW_INT4_GROUPS": "two"}, "is 'two', expected 1 or 2"),
    ],
)
def test_contradictions_are_errors(environ, said):
    with pytest.raises(ValueError, match=said):
        env.resolve(environ)


def test_calibration():
    assert env.resolve({})[0].calibration == env.resolve({env.CALIBRATION: "auto"})[0].calibration == "auto"
    assert env.resolve({env.CALIBRATION: "none"})[0].calibration == "none"
    assert Path(env.resolve({env.CALIBRATION: "a.safetensors"})[0].calibration).is_absolute()


def test_batch_invariance():
    assert not env.resolve({})[0].batch_invariant
    assert env.resolve({env.BATCH_INVARIANT: "1"})[0].batch_invariant


def test_groups():
    assert env.resolve({})[0].kv_format(64).row_bytes == 36
    options = env.resolve({env.GROUPS: "2"})[0]
    assert options.kv_format(64).row_bytes == 40 and options.kv_format(64).bits_per_element == 5
    assert "2 groups per row" in options.kv_format(64).describe()


def test_format_of_options():
    assert env.Options().kv_format(128) == env.Options("k").kv_format(128)  # not calibrated: keys alone
    assert env.Options().kv_format(128).rotation_order == 128
    assert env.Options().kv_format(96).rotation_order == 32
    assert env.Options("none").kv_format(64).rotation_order == 1
    assert env.Options("kv", 16).kv_format(64).rotate_v
    for options, head_dim in ((env.Options(order=128), 64), (env.Options(), 72), (env.Options(order=64), 96)):
        with pytest.raises(ValueError, match="head_dim|power of two"):
            options.kv_format(head_dim)


def test_options_travel_whole(monkeypatch):
    monkeypatch.setenv(env.RESOLVED, "")
    for options in (env.Options(), env.Options("k", 32), env.Options("none", calibration="none", groups=2)):
        env.publish(options)
        assert env.published() == options
        assert env.published().fingerprint == options.fingerprint
    different = env.Options(), env.Options("k"), env.Options("kv", 64), env.Options(groups=2)
    assert len({o.fingerprint for o in different}) == 4
    monkeypatch.delenv(env.RESOLVED)
    with pytest.raises(RuntimeError, match="is not set"):
        env.published()


def test_flag_and_variable_must_agree(monkeypatch):
    monkeypatch.setenv("SAW_INT4_ROTATION", "none")
    with pytest.raises(SystemExit, match="Leave one of them out"):
        launch_server.main(["--saw-rotation", "kv", "--model-path", "nowhere"])
    assert os.environ["SAW_INT4_ROTATION"] == "none"
