"""The operators, as Python calls. Knows torch and the row format, nothing of SGLang.

Letters: T tokens, B requests, H_q query heads, H_kv KV heads, D head_dim, R rotation order. Caches are uint8
``[num_slots, H_kv, row_bytes(D, groups)]``, one for K and one for V, as ``saw_int4/format.py`` lays them out; their
rows' length says how many groups they have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saw_int4 import _C  # noqa: F401  (registers torch.ops.saw_int4)

_ops = torch.ops.saw_int4


def append_kv(
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
    """Transform, quantize and scatter the K and V of T new tokens into their slots.

    Args:
        k, v: ``[T, H_kv, D]`` bfloat16, float16 or float32; keys after RoPE. Any stride between tokens.
        k_cache, v_cache: mutated at ``slots`` only.
        slots: ``[T]`` int64. A negative slot skips its token; of equal slots any one may win
            (on a GPU their words may mix: share only slots that nobody reads).
        rotation_order: R, 1 for none; V is rotated too when ``rotate_v``.
        k_mean, k_inv_scale, k_sign: fp32 ``[H_kv, D]``, mu, 1/s and the signs (+1 or -1, applied after the rotation)
            of the calibrated transform; all or none.

    Raises:
        RuntimeError: a shape, dtype, device or slot is wrong. Nothing has been written then (on a GPU a slot past
            the end of the cache stops the kernel instead).
    """
    _ops.append_kv(
        k,
        v,
        k_cache,
        v_cache,
        slots,
        rotation_order=rotation_order,
        rotate_v=rotate_v,
        k_mean=k_mean,
        k_inv_scale=k_inv_scale,
        k_sign=k_sign,
    )


def decode_attention(
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
    """Attention of each request's last query rows over its INT4 rows, which already hold the new tokens.

    Query row i of the n rows of request b stands at position ``seq_lens[b] - n + i`` and sees the tokens up to
    itself. Scores are those of the untransformed keys, mu included: ``lse`` may be merged with any other piece.

    Args:
        q: ``[T_q, H_q, D]`` bfloat16, float16 or float32, untransformed; any stride between tokens.
        slot_table: int32 ``[rows, max_len]``: token t of request b lies at ``slot_table[table_rows[b], t]``.
        table_rows, seq_lens: ``[B]`` int64; ``seq_lens`` counts the new tokens. A request of length 0 yields zeros
            (lse -inf).
        q_indptr: int32 ``[B + 1]``, where each request's query rows start; None: ``max_q_len`` rows each.
        max_q_len: upper bound of query rows per request.
        page_size: slots of tokens ``p*page_size .. (p+1)*page_size - 1`` are known to be consecutive.
        k_mean, k_scale, k_sign: fp32 ``[H_kv, D]``, mu, s and the signs of the calibrated transform; all or none.
        logit_cap: > 0: logits become ``cap * tanh(logits / cap)``.
        window: >= 0: a row at position p sees tokens ``p - window .. p``.
        sinks: fp32 ``[H_q]``, one extra logit per head in the denominator.
        tree_mask: int64 ``[T_q]``: bit j of a row says whether it sees new token j of its request (at most 64 new
            tokens); None: causal.
        batch_invariant: on a GPU, a request's bits depend on nothing else in the batch (among calls of equal
            ``max_q_len``); slower, csrc/README.md has the price. On a CPU they never do.
        out: ``[T_q, H_q, D]`` like q, contiguous; allocated when None. Mutated.
        lse: fp32 ``[T_q, H_q]``, natural logarithm; mutated when given.
        workspace: see ``decode_workspace``; only the CUDA kernel uses one.

    Returns:
        ``out``.

    Raises:
        RuntimeError: a shape, dtype, device, length or slot is wrong; nothing has been written then.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if workspace is None and q.is_cuda:
        rows = len(seq_lens) * max_q_len
        workspace = decode_workspace(q.device, rows, q.shape[1], q.shape[2], batch_invariant=batch_invariant)
    _ops.decode_attention(
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
        max_q_len=max_q_len,
        page_size=page_size,
        sm_scale=sm_scale,
        rotation_order=rotation_order,
        rotate_v=rotate_v,
        k_mean=k_mean,
        k_scale=k_scale,
        k_sign=k_sign,
        logit_cap=logit_cap,
        window=window,
        sinks=sinks,
        tree_mask=tree_mask,
        batch_invariant=batch_invariant,
    )
    return out


def decode_workspace(
    device: torch.device, num_query_rows: int, num_q_heads: int, head_dim: int, *, batch_invariant: bool = False
) -> Tensor | None:
    """Scratch for ``decode_attention`` calls of up to ``num_query_rows`` rows, ``max_q_len`` no larger: uint8, zeroed;
    None on CPU.

    Reusable by calls with no more query heads and no larger head_dim. Calls that may run at the same time need one
    each. For batch-invariant calls the rows are those that ``max_q_len`` allows, requests times ``max_q_len``, at
    about ``128 * D`` bytes per query head each.
    """
    if device.type != "cuda":
        return None
    nbytes = decode_workspace_bytes(device, num_query_rows, num_q_heads, head_dim, batch_invariant=batch_invariant)
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def decode_workspace_bytes(
    device: torch.device, num_query_rows: int, num_q_heads: int, head_dim: int, *, batch_invariant: bool = False
) -> int:
    """Bytes of ``decode_workspace`` on a CUDA device."""
    return _C.decode_workspace_bytes(device.index or 0, num_query_rows, num_q_heads, head_dim, batch_invariant)


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_out: Tensor, v_out: Tensor) -> None:
    """Dequantize the rows at ``slots`` (int32 ``[N]``), leaving them in the transformed space.

    Args:
        k_out, v_out: ``[N, H_kv, D]`` bfloat16, float16 or float32, contiguous; mutated.

    Raises:
        RuntimeError: a shape, dtype, device or slot is wrong; nothing has been written then.
    """
    _ops.gather_kv(k_cache, v_cache, slots, k_out, v_out)


def transform_rows(
    x: Tensor,
    *,
    rotation_order: int,
    mean: Tensor | None = None,
    mul: Tensor | None = None,
    sign: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``sign * H_R((x - mean) * mul)`` row by row: queries, fresh keys, and the way back for outputs.

    Args:
        x: ``[T, H, D]`` bfloat16, float16 or float32, any stride between tokens.
        mean, mul, sign: fp32 ``[H_kv, D]``, each optional; head h of x takes row ``h // (H / H_kv)``.
        out: like x, contiguous; allocated when None. Mutated. May be x.

    Returns:
        ``out``.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _ops.transform_rows(x, out, rotation_order=rotation_order, mean=mean, mul=mul, sign=sign)
    return out


# Every operator only writes into its arguments, so that its fake has nothing to compute.
for _name in ("append_kv", "decode_attention", "gather_kv", "transform_rows"):
    torch.library.register_fake(f"saw_int4::{_name}")(lambda *args, **kwargs: None)
