"""The kernels of csrc as an engine for the operator tests: ``saw_int4.ops`` on CPU tensors, emulated."""

from __future__ import annotations

import torch
from torch import Tensor

from emulator import build

# The operators, and the instantiations of decode that the CUDA build compiles, as C++.
SOURCES = (
    *(build.HERE / name for name in ("library.cpp", "append_op.cpp", "decode_op.cpp", "gather_op.cpp")),
    build.HERE / "transform_op.cpp",
    *sorted((build.ROOT / "csrc" / "decode").glob("decode_cuda_*.cu")),
)


class EmulatedEngine:
    """Same calls as ``saw_int4.ops``. Raises the library's ``EmulatorError`` for whatever a kernel does wrong."""

    name = "emulated"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self._library = build.load_library("_emulated_ops", SOURCES, link_torch=True)
        self._workspaces: dict[tuple[int, int, bool], Tensor] = {}

    def configure(self, *, order: str = "ascending", resident_blocks: int = 1, seed: int = 0, sm_count: int = 4):
        """How later launches run: block order "ascending", "descending" or "shuffled"; blocks in flight at a time;
        seed of whatever is random; SMs of the pretended device.
        """
        self._library.configure(order=order, resident_blocks=resident_blocks, seed=seed, sm_count=sm_count)

    def append_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        *,
        rotation_order: int,
        rotate_v: bool = False,
        k_mean: Tensor | None = None,
        k_inv_scale: Tensor | None = None,
        k_sign: Tensor | None = None,
    ) -> None:
        self._library.append_kv(k, v, k_cache, v_cache, slots, rotation_order, rotate_v, k_mean, k_inv_scale, k_sign)

    def decode_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_table: Tensor,
        table_rows: Tensor,
        seq_lens: Tensor,
        q_indptr: Tensor | None = None,
        *,
        sm_scale: float,
        max_q_len: int = 1,
        page_size: int = 1,
        rotation_order: int,
        rotate_v: bool = False,
        k_mean: Tensor | None = None,
        k_scale: Tensor | None = None,
        k_sign: Tensor | None = None,
        logit_cap: float = 0.0,
        window: int = -1,
        sinks: Tensor | None = None,
        tree_mask: Tensor | None = None,
        batch_invariant: bool = False,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            # NaN where the kernel forgets to write.
            out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        if workspace is None:
            workspace = self._workspace_for(q, len(seq_lens) * max_q_len, batch_invariant)
        self._library.decode_attention(
            q,
            k_cache,
            v_cache,
            slot_table,
            table_rows,
            seq_lens,
            q_indptr,
            out,
            lse,
            workspace,
            max_q_len,
            page_size,
            sm_scale,
            rotation_order,
            rotate_v,
            k_mean,
            k_scale,
            k_sign,
            logit_cap,
            window,
            sinks,
            tree_mask,
            batch_invariant,
        )
        return out

    def _workspace_for(self, q: Tensor, rows: int, batch_invariant: bool) -> Tensor:
        """One workspace for all calls of a model's shape, as a server has: what a call leaves, the next one finds."""
        _, heads, head_dim = q.shape
        needed = self._library.decode_workspace_bytes(max(rows, 64), heads, head_dim, batch_invariant)
        key = (heads, head_dim, batch_invariant)
        if key not in self._workspaces or self._workspaces[key].numel() < needed:
            self._workspaces[key] = torch.zeros(needed, dtype=torch.uint8)
        return self._workspaces[key]

    def gather_kv(self, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_out: Tensor, v_out: Tensor) -> None:
        self._library.gather_kv(k_cache, v_cache, slots, k_out, v_out)

    def transform_rows(
        self,
        x: Tensor,
        *,
        rotation_order: int,
        mean: Tensor | None = None,
        mul: Tensor | None = None,
        sign: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            out = torch.full(x.shape, float("nan"), dtype=x.dtype)
        self._library.transform_rows(x, out, rotation_order, mean, mul, sign)
        return out


def load() -> EmulatedEngine:
    """Compile the emulated operators if need be (a minute or two, once per content), and return the engine.

    Raises:
        RuntimeError: there is no C++ compiler, or a kernel does not compile.
    """
    return EmulatedEngine()
