"""16-bit attention of one request's new rows over its keys and values, all in the transformed space."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK_ROWS = 512  # query rows at a time, so that masks and scores stay small


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    first_position: int,
    sm_scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    sinks: Tensor | None = None,
    score_shift: Tensor | None = None,
) -> Tensor:
    """Causal attention of T rows at positions ``first_position ..`` over N keys at positions 0 .. N-1.

    Args:
        q: ``[T, H_q, D]``; k, v: ``[N, H_kv, D]``; one dtype.
        window: >= 0: a row at position p sees keys p - window .. p.
        logit_cap: > 0: logits become cap * tanh(logits / cap).
        sinks: fp32 ``[H_q]``, an extra logit in the denominator.
        score_shift: fp32 ``[T, H_q]``, added to the logits before the cap: the part of q.k that centred keys leave
            out. Without cap and sinks softmax does not see it.

    Returns:
        ``[T, H_q, D]``.
    """
    exotic = logit_cap > 0 or sinks is not None
    out = torch.empty_like(q)
    for start in range(0, q.shape[0], BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, q.shape[0]))
        first, last = first_position + rows.start, first_position + rows.stop  # positions of these rows
        low = max(0, first - window) if window >= 0 else 0
        positions = torch.arange(first, last, device=q.device)[:, None]
        keys = torch.arange(low, last, device=q.device)[None]
        mask = keys <= positions
        if window >= 0:
            mask &= keys >= positions - window
        block = (q[rows], k[low:last], v[low:last], mask, sm_scale)
        if exotic:
            shift = None if score_shift is None else score_shift[rows]
            out[rows] = _exotic_block(*block, logit_cap, sinks, shift)
        else:
            out[rows] = _block(*block)
    return out


def _block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sm_scale: float) -> Tensor:
    batch = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    out = scaled_dot_product_attention(*batch, attn_mask=mask, scale=sm_scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _exotic_block(q, k, v, mask, sm_scale, logit_cap, sinks, score_shift) -> Tensor:
    """The same in fp32 by hand, for what scaled_dot_product_attention has no argument for."""
    T, H_q, D = q.shape
    H_kv = k.shape[1]
    grouped = q.float().view(T, H_kv, H_q // H_kv, D)
    logits = torch.einsum("thgd,nhd->thgn", grouped, k.float()).reshape(T, H_q, -1) * sm_scale
    if score_shift is not None:
        logits += score_shift[..., None] * sm_scale
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    logits = logits.masked_fill(~mask[:, None], float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[None, :, None].expand(T, -1, 1)], dim=-1)
    weights = logits.softmax(-1)[..., : k.shape[0]].reshape(T, H_kv, H_q // H_kv, -1)
    return torch.einsum("thgn,nhd->thgd", weights, v.float()).reshape(T, H_q, D).to(q.dtype)
