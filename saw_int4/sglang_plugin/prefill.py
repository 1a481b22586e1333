"""16-bit attention of long extends: rows of several requests over packed keys, and merging over pieces of keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK_ROWS = 512  # query rows at a time where masks or scores are written out
BLOCK_SCORES = 1 << 26  # and fp32 scores at a time: 256 MB


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_indptr: Tensor,
    q_lens: list[int],
    k_indptr: Tensor,
    k_lens: list[int],
    *,
    causal: bool,
    sm_scale: float,
    window: int = -1,
    logit_cap: float = 0.0,
    score_shift: Tensor | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed requests, each over its own keys.

    Args:
        q: ``[T, H_q, D]``; k, v: ``[N, H_kv, D]``; one dtype. Any stride between tokens.
        q_lens, k_lens: rows and keys of each request; q_indptr, k_indptr: int32, where each one's start.
        causal: a request's last row stands at its last key; else every row sees every key.
        window: >= 0, with ``causal``: a row at position p sees keys p - window .. p.
        logit_cap: > 0: logits become cap * tanh(logits / cap).
        score_shift: fp32 ``[T, H_q]``, added to q.k before the cap: the part that centred keys leave out. Only for
            a cap: softmax does not see it otherwise.

    Returns:
        ``[T, H_q, D]``, and where ``need_lse`` fp32 ``[T, H_q]``, the natural logarithm of each row's denominator.
    """
    if q.is_cuda and q.dtype != torch.float32 and logit_cap <= 0:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, q_indptr, k_indptr, max(q_lens), max(k_lens), 0.0, causal, False,
            scale=sm_scale, window_size_left=window if causal and window >= 0 else None,
            window_size_right=0 if causal else None,
        )  # fmt: skip
        return out, lse.transpose(0, 1) if need_lse else None

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if need_lse else None
    first_row = first_key = 0
    for T, N in zip(q_lens, k_lens):
        keys, values = (x[first_key : first_key + N] for x in (k, v))
        step = max(1, min(BLOCK_ROWS, BLOCK_SCORES // (N * q.shape[1])))
        for start in range(0, T, step):
            end = min(start + step, T)
            rows = slice(first_row + start, first_row + end)
            low, high, mask = _sight(N - T + start, N - T + end, N, causal, window, q.device)
            args = (q[rows], keys[low:high], values[low:high], mask, sm_scale)
            if need_lse or logit_cap > 0:
                shift = None if score_shift is None else score_shift[rows]
                out[rows], block_lse = _block_by_hand(*args, logit_cap, shift)
                if need_lse:
                    lse[rows] = block_lse
            else:
                out[rows] = _block(*args)
        first_row, first_key = first_row + T, first_key + N
    return out, lse


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: weights are the shares of the denominators."""
    total = torch.logaddexp(lse, other_lse)
    merged = out * (lse - total).exp()[..., None] + other * (other_lse - total).exp()[..., None]
    return merged.to(out.dtype), total


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention with one more logit per head (fp32 ``[H_q]``) in the denominator, which has no value."""
    return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype)


def _sight(first: int, last: int, N: int, causal: bool, window: int, device) -> tuple[int, int, Tensor | None]:
    """Keys [low, high) that rows at positions [first, last) see, and the mask [rows, keys] inside it."""
    if not causal:
        return 0, N, None
    low = max(0, first - window) if window >= 0 else 0
    positions, keys = (torch.arange(a, last, device=device) for a in (first, low))
    mask = keys <= positions[:, None]
    if window >= 0:
        mask &= keys >= positions[:, None] - window
    return low, last, mask


def _block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float) -> Tensor:
    batch = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    out = scaled_dot_product_attention(*batch, attn_mask=mask, scale=sm_scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _block_by_hand(q, k, v, mask, sm_scale, logit_cap, score_shift) -> tuple[Tensor, Tensor]:
    """The same in fp32, for what scaled_dot_product_attention does not take or return."""
    T, H_q, D = q.shape
    H_kv = k.shape[1]
    grouped = q.float().view(T, H_kv, H_q // H_kv, D)
    logits = torch.einsum("thgd,nhd->thgn", grouped, k.float()).reshape(T, H_q, -1) * sm_scale
    if score_shift is not None:
        logits += score_shift[..., None] * sm_scale
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().view(T, H_kv, H_q // H_kv, -1)
    return torch.einsum("thgn,nhd->thgd", weights, v.float()).reshape(T, H_q, D).to(q.dtype), lse
