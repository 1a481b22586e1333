"""The kernels of csrc as an engine for the operator tests: ``saw_int4.ops`` on CPU tensors, emulated."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from emulator import build
from saw_int4 import ops

# The operators, and the instantiations of decode that the CUDA build compiles, as C++.
SOURCES = (
    *(build.HERE / name for name in ("library.cpp", "append_op.cpp", "decode_op.cpp", "gather_op.cpp")),
    build.HERE / "transform_op.cpp",
    *sorted((build.ROOT / "csrc" / "decode").glob("decode_cuda_*.cu")),
)
# The same, but head_dim 64 with two groups as for other architectures than sm_90.
OTHER_ARCH_SOURCES = tuple(
    build.HERE / "decode_other_arch.cpp" if source.name == "decode_cuda_d64_two_groups.cu" else source
    for source in SOURCES
)


class EmulatedEngine:
    """Same calls as ``saw_int4.ops``. Raises the library's ``EmulatorError`` for whatever a kernel does wrong."""

    name = "emulated"
    device = torch.device("cpu")

    def __init__(self, sources: tuple[Path, ...]) -> None:
        self._library = build.load_library("_emulated_ops", sources, link_torch=True)
        self._workspaces: dict[tuple[int, int, bool], Tensor] = {}

    def configure(self, **options):
        """How later launches run: block ``order`` "ascending", "descending" or "shuffled"; ``resident_blocks`` in
        flight at a time; ``seed`` of whatever is random; ``sm_count`` of the pretended device, ``shared_bytes`` that a
        block of it may have, and whether it has ``dependent_launches``. What is not named is as at first: one block
        after the other, on 4 SMs of an H100.
        """
        self._library.configure(**options)

    def last_kernel(self) -> str:
        """Name of the kernel that was launched last."""
        return self._library.last_kernel()

    def append_kv(self, *args, **options) -> None:
        self._launch("append_kv", arguments(ops.append_kv, *args, **options))

    def decode_attention(self, *args, **options) -> Tensor:
        call = arguments(ops.decode_attention, *args, **options)
        call["out"] = to_be_written(call["q"], call["out"])
        if call["workspace"] is None:
            rows = len(call["seq_lens"]) * call["max_q_len"]
            call["workspace"] = self._workspace_for(call["q"], rows, call["batch_invariant"])
        self._launch("decode_attention", call)
        return call["out"]

    def gather_kv(self, *args, **options) -> None:
        self._launch("gather_kv", arguments(ops.gather_kv, *args, **options))

    def transform_rows(self, *args, **options) -> Tensor:
        call = arguments(ops.transform_rows, *args, **options)
        call["out"] = to_be_written(call["x"], call["out"])
        self._launch("transform_rows", call)
        return call["out"]

    def _launch(self, operator: str, call: dict) -> None:
        """The library takes arguments in the order of the operator's schema."""
        schema = getattr(torch.ops.saw_int4, operator).default._schema
        getattr(self._library, operator)(*(call[argument.name] for argument in schema.arguments))

    def _workspace_for(self, q: Tensor, rows: int, batch_invariant: bool) -> Tensor:
        """One workspace for all calls of a model's shape, as a server has: what a call leaves, the next one finds."""
        _, heads, head_dim = q.shape
        needed = self._library.decode_workspace_bytes(max(rows, 64), heads, head_dim, batch_invariant)
        key = (heads, head_dim, batch_invariant)
        if key not in self._workspaces or self._workspaces[key].numel() < needed:
            self._workspaces[key] = torch.zeros(needed, dtype=torch.uint8)
        return self._workspaces[key]


def arguments(operator: Callable, *args, **options) -> dict:
    """What a call of one of ``saw_int4.ops`` passes, defaults included, by name."""
    call = inspect.signature(operator).bind(*args, **options)
    call.apply_defaults()
    return call.arguments


def to_be_written(like: Tensor, out: Tensor | None) -> Tensor:
    """``out``, or one with NaN where the kernel forgets to write."""
    return torch.full(like.shape, float("nan"), dtype=like.dtype) if out is None else out


def load(*, other_arch: bool = False) -> EmulatedEngine:
    """Compile the emulated operators if need be (a minute or two, once per content), and return the engine.

    other_arch: decode of head_dim 64 with two groups is what GPUs other than sm_90 run.

    Raises:
        RuntimeError: there is no C++ compiler, or a kernel does not compile.
    """
    return EmulatedEngine(OTHER_ARCH_SOURCES if other_arch else SOURCES)
