"""``saw-int4 doctor``: does everything fit, and if not, what to do. Starts no server and loads no weights."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator

import torch

from saw_int4 import env
from saw_int4.finding import BROKEN, NOTE, OK, WARNING, Finding

OLDEST_GPU = (8, 0)  # Ampere: bf16 tensor cores and asynchronous copies
REBUILD = "rebuild where nvcc is found: pip install --no-build-isolation --no-deps --force-reinstall ."


def main(model: str | None, flags: list[str]) -> int:
    """Print every finding. Returns 1 when something is broken or the model would be refused, else 0.

    Args:
        model: checkpoint to try, or None.
        flags: SGLang's own flags to try it with.
    """
    found = []
    for finding in findings(model, flags):
        print(finding, flush=True)
        found.append(finding)
    broken, warned = (sum(f.level == level for f in found) for level in (BROKEN, WARNING))
    print(f"{sum(f.level != NOTE for f in found)} checks: {broken} broken, {warned} warnings")
    return 1 if broken else 0


def findings(model: str | None = None, flags: list[str] | None = None) -> Iterator[Finding]:
    """Every check, as it is made."""
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.machine()}")
    yield _torch()
    yield from _devices()
    extension = _extension()
    yield from extension
    yield _options()
    if any(finding.level == BROKEN for finding in extension):
        return  # the plugin imports the extension
    if importlib.util.find_spec("sglang") is None:
        yield Finding(BROKEN, "sglang", "not installed for this Python", "scripts/setup.sh, or pip install sglang")
        return
    yield from _sglang(model, flags or [])


def _torch() -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    if torch.version.hip:
        return Finding(BROKEN, "torch", f"{torch.__version__}, {build}", "ROCm is not served: use CUDA or CPU")
    return Finding(OK, "torch", f"{torch.__version__}, {build}")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(OK, "device", f"no GPU that torch can use; CPU with {os.cpu_count()} cores")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
        text += f"{properties.total_memory / 2**30:.0f} GiB"
        if (properties.major, properties.minor) < OLDEST_GPU:
            yield Finding(BROKEN, "device", text, "the kernels need compute capability 8.0 (Ampere) or later")
        else:
            yield Finding(OK, "device", text)


def _extension() -> list[Finding]:
    try:
        from saw_int4 import _C, ops  # noqa: F401
    except ImportError as error:
        return [Finding(BROKEN, "extension", f"cannot be loaded: {error}", REBUILD)]
    others = [isa for isa in _C.cpu_isas() if isa != _C.cpu_isa()]
    text = f"CPU kernels use {_C.cpu_isa()} (this machine also runs {', '.join(others) or 'no other'})"
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("saw_int4::append_kv", "CUDA")
    text += f"; CUDA kernels {'are' if has_cuda else 'are not'} built in"
    try:
        _try_operators()
    except RuntimeError as error:
        return [Finding(BROKEN, "extension", f"{text}; a trial failed: {error}", REBUILD)]
    if torch.cuda.is_available() and not has_cuda:
        return [Finding(BROKEN, "extension", f"{text}, and there is a GPU", REBUILD)]
    return [Finding(OK, "extension", text)]


def _try_operators() -> None:
    """RuntimeError unless a few tokens come back from the cache: an extension older than the Python code fails here."""
    from saw_int4 import _C, format, ops

    if _C.FORMAT_VERSION != format.FORMAT_VERSION:
        raise RuntimeError(f"it was built for format {_C.FORMAT_VERSION}, the package has {format.FORMAT_VERSION}")
    tokens, head_dim = 4, 64
    k, v = torch.randn(2, tokens, 1, head_dim, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(tokens) + 1
    for groups in range(1, format.MAX_GROUPS + 1):
        k_cache, v_cache = torch.zeros(2, tokens + 1, 1, format.row_bytes(head_dim, groups), dtype=torch.uint8)
        ops.append_kv(k, v, k_cache, v_cache, slots, rotation_order=1)
        k_back, v_back = torch.empty(2, tokens, 1, head_dim, dtype=torch.bfloat16)
        ops.gather_kv(k_cache, v_cache, slots.int(), k_back, v_back)
        for name, x, back in (("K", k, k_back), ("V", v, v_back)):
            step = (x.amax(-1) - x.amin(-1)).max().item() / format.CODE_MAX
            error = (back.float() - x).abs().max().item()
            if not error < 0.6 * step:  # half a step, and the roundings of scale, offset and bfloat16
                raise RuntimeError(f"{name} came back {error:.3f} off, expected less than {0.6 * step:.3f}")


def _options() -> Finding:
    try:
        options, notes = env.resolve()
        formats = "; ".join(options.kv_format(head_dim).describe() for head_dim in (64, 128))
    except ValueError as error:
        return Finding(BROKEN, "format", str(error), "change the SAW_INT4_* variables (saw_int4/env.py lists them)")
    return Finding(OK, "format", "; ".join([formats, *notes]))


def _sglang(model: str | None, flags: list[str]) -> Iterator[Finding]:
    from saw_int4 import launch_server

    launch_server.choose_platform()
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # SGLang's own, about optional parts that are missing here
    try:
        from saw_int4.sglang_plugin import fit

        found = []
        for finding in fit.findings():
            found.append(finding)
            yield finding
    except (Exception, SystemExit) as error:  # noqa: BLE001  (an SGLang that cannot be imported is a finding)
        text = f"cannot be imported: {type(error).__name__}: {error}"
        yield Finding(BROKEN, "sglang", text, f"does {sys.executable} -c 'import sglang' work by itself?")
        return
    if model is not None and not any(finding.level == BROKEN for finding in found):
        yield from _model(model, flags)


def _model(model: str, flags: list[str]) -> Iterator[Finding]:
    from saw_int4.sglang_plugin import fit

    argv = ["--model-path", model, "--kv-cache-dtype", "int4", "--log-level", "error", *flags]
    served, text = fit.dry_run(argv)
    yield Finding(OK, "model", text) if served else Finding(BROKEN, "model", f"refused: {text}")
    for feature in fit.refused_features():
        yield Finding(NOTE, "refused", feature)
