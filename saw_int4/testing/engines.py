"""Who computes the operators in a test or a benchmark: CPU kernels of each instruction set, or a GPU."""

from __future__ import annotations

from typing import Protocol

import torch

from saw_int4 import _C, ops


class Engine(Protocol):
    """The operators of ``saw_int4.ops`` on tensors of ``device``, by one implementation."""

    name: str
    device: torch.device

    def append_kv(self, *args, **kwargs) -> None: ...
    def decode_attention(self, *args, **kwargs) -> torch.Tensor: ...
    def gather_kv(self, *args, **kwargs) -> None: ...
    def transform_rows(self, *args, **kwargs) -> torch.Tensor: ...


class OperatorEngine:
    """``saw_int4.ops`` itself. On a CPU every call runs with one instruction set."""

    def __init__(self, name: str, device: str, isa: str | None = None) -> None:
        self.name, self.device, self._isa = name, torch.device(device), isa

    def _call(self, operator, *args, **kwargs):
        if self._isa is None:
            return operator(*args, **kwargs)
        before = _C.cpu_isa()
        _C.set_cpu_isa(self._isa)
        try:
            return operator(*args, **kwargs)
        finally:
            _C.set_cpu_isa(before)

    def append_kv(self, *args, **kwargs) -> None:
        self._call(ops.append_kv, *args, **kwargs)

    def decode_attention(self, *args, **kwargs) -> torch.Tensor:
        return self._call(ops.decode_attention, *args, **kwargs)

    def gather_kv(self, *args, **kwargs) -> None:
        self._call(ops.gather_kv, *args, **kwargs)

    def transform_rows(self, *args, **kwargs) -> torch.Tensor:
        return self._call(ops.transform_rows, *args, **kwargs)


def operator_engines() -> dict[str, OperatorEngine]:
    """Every engine of this machine by name: ``cpu-<isa>`` for each instruction set, and ``cuda``."""
    engines = {f"cpu-{isa}": OperatorEngine(f"cpu-{isa}", "cpu", isa) for isa in _C.cpu_isas()}
    if torch.cuda.is_available():
        engines["cuda"] = OperatorEngine("cuda", "cuda")
    return engines
