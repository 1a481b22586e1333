"""The oracle: format, transform and attention in slow, obvious PyTorch.

Written from the design, not from the kernels: it shares no arithmetic and no constant with csrc/ or format.py, and
nothing but tests and evaluations calls it. Bytes are reproduced exactly, so every step of quantization is one fp32
operation. Attention is computed in float64 over the dequantized cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(x: Tensor, order: int) -> Tensor:
    """Orthonormal block-diagonal Hadamard transform of the last dimension, in x's own precision.

    Args:
        x: ``[..., D]`` floating point.
        order: block size, 1 or a power of two that divides D.

    Returns:
        A new tensor like x. The transform is its own inverse. In float32 the result is the format's, bit for bit:
        stages of stride 1, 2, 4, ... and one product with ``float(order ** -0.5)`` at the end.
    """
    if order == 1:
        return x.clone()
    y = x.reshape(*x.shape[:-1], x.shape[-1] // order, order)
    stride = 1
    while stride < order:
        pairs = y.reshape(*y.shape[:-1], order // (2 * stride), 2, stride)
        lo, hi = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((lo + hi, lo - hi), dim=-2).reshape(y.shape)
        stride *= 2
    return (y * torch.tensor(order**-0.5, dtype=x.dtype)).reshape(x.shape)


def transform_keys(
    k: Tensor, order: int, mean: Tensor | None = None, inv_scale: Tensor | None = None, sign: Tensor | None = None
) -> Tensor:
    """``sign * H_R((K - mean) * inv_scale)``.

    Args:
        k: ``[T, H_kv, D]`` any floating dtype; float64 stays float64, all else is computed in float32.
        mean, inv_scale, sign: ``[H_kv, D]``, all or none None.
    """
    x = k if k.dtype == torch.float64 else k.float()
    if mean is not None:
        x = (x - mean.to(x.dtype)) * inv_scale.to(x.dtype)
    x = hadamard(x, order)
    return x if sign is None else x * sign.to(x.dtype)


def nibble_position(channel: int) -> tuple[int, int]:
    """(byte of the row, bit inside that byte) of a channel's code."""
    word, within = divmod(channel, 8)
    half, step = within % 2, within // 2
    return 4 * word + 2 * half + step // 2, 4 * (step % 2)


def group_channels(head_dim: int, groups: int) -> Tensor:
    """int64 ``[groups, head_dim / groups]``: the channels that share a scale and an offset, in ascending order.

    Two groups: the lower and the upper four of every eight channels.
    """
    channels = torch.arange(head_dim)
    if groups == 1:
        return channels[None]
    upper = channels // 4 % 2 == 1
    return torch.stack((channels[~upper], channels[upper]))


def groups_of(rows: Tensor) -> int:
    """How many groups rows have, by their length: an even number of 4-byte words when two, an odd one when one."""
    return 2 if rows.shape[-1] % 8 == 0 else 1


def fit_to_codes(fine: Tensor, codes: Tensor, low: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset that fit a group of channels best, in the least-squares sense, given its codes.

    Args:
        fine: int64 ``[..., n]``, the group in units above ``low``.
        codes: int64 ``[..., n]``, not all equal.
        low, unit: float32 ``[..., 1]``.

    Returns:
        float16 ``[..., 1]`` each.
    """
    n = fine.shape[-1]
    s1, s2 = codes.sum(-1, keepdim=True), (codes * codes).sum(-1, keepdim=True)
    total, cross = fine.sum(-1, keepdim=True), (codes * fine).sum(-1, keepdim=True)
    a = (n * cross - s1 * total).float() / (n * s2 - s1 * s1).float()
    b = (total.float() - a * s1.float()) / float(n)
    return (unit * a).half(), (low + unit * b).half()


def best_shift(fine: Tensor) -> Tensor:
    """Where to lay the grid of 256 units a step over a group: the first of three shifts that rounds it best.

    Args:
        fine: int64 ``[..., n]``, in units above the smallest.

    Returns:
        int64 ``[..., 1]``.
    """
    best = torch.zeros_like(fine[..., :1])
    least = torch.full_like(best, 2**62)
    for shift in (0, 64, 128):
        error = ((fine + shift) % 256 - 128).square().sum(-1, keepdim=True)
        best = torch.where(error < least, shift, best)
        least = torch.minimum(error, least)
    return best


def quantize_rows(t: Tensor, groups: int = 1) -> Tensor:
    """Quantize transformed rows.

    Args:
        t: ``[..., D]`` float32, already transformed.

    Returns:
        uint8 ``[..., D/2 + 4 * groups]``.
    """
    head_dim = t.shape[-1]
    channels = group_channels(head_dim, groups)
    x = t[..., channels]  # [..., groups, n]
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    unit = (high - low) / 3967.0
    scale, offset = (unit * 256.0).half(), low.half()

    def anywhere(bad: Tensor) -> Tensor:
        """[..., 1, 1]: damage of one group is damage of the row."""
        return bad.any(-2, keepdim=True)

    damaged = anywhere(~(x.isfinite().all(-1, keepdim=True) & unit.isfinite()))
    idle = damaged | (scale == 0)  # nothing to round: damaged, or a constant group
    per_unit = torch.tensor(3967.0) / (high - low)  # with a number on the left torch multiplies by the reciprocal
    # A product of two floats is exact in float64: it is rounded once.
    fine = torch.round((x - low).double() * per_unit.double())
    fine = torch.where(idle, torch.zeros_like(fine), fine).long()
    codes = (fine + best_shift(fine)) // 256
    codes = torch.where(idle, torch.zeros_like(codes), codes)
    fitted_scale, fitted_offset = fit_to_codes(fine, codes, low, unit)
    scale, offset = torch.where(idle, scale, fitted_scale), torch.where(idle, offset, fitted_offset)
    offset = torch.where(offset == 0, torch.zeros_like(offset), offset)
    damaged |= anywhere(~(scale.isfinite() & offset.isfinite()))
    codes = torch.where(damaged, torch.zeros_like(codes), codes).to(torch.uint8)
    nan = torch.full_like(scale, math.nan)
    params = torch.cat((torch.where(damaged, nan, scale), torch.where(damaged, nan, offset)), -1).flatten(-2)
    param_words = torch.where(params.isnan(), 0x7E00, params.view(torch.int16).int() & 0xFFFF)

    rows = torch.zeros(*t.shape[:-1], head_dim // 2 + 4 * groups, dtype=torch.uint8)
    for group in range(groups):
        for i, channel in enumerate(channels[group].tolist()):
            byte, bit = nibble_position(channel)
            rows[..., byte] |= codes[..., group, i] << bit
    for i in range(2 * groups):
        rows[..., head_dim // 2 + 2 * i] = (param_words[..., i] & 0xFF).to(torch.uint8)
        rows[..., head_dim // 2 + 2 * i + 1] = (param_words[..., i] >> 8).to(torch.uint8)
    return rows


def dequantize_rows(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scale * code + offset`` of every channel, still transformed.

    Args:
        rows: uint8 ``[..., D/2 + 4]``, or ``[..., D/2 + 8]`` of two groups.
        dtype: float32 and narrower: computed in float32, then rounded once more. float64: exact.

    Returns:
        ``[..., D]``.
    """
    groups = groups_of(rows)
    head_dim = (rows.shape[-1] - 4 * groups) * 2
    codes = torch.stack(
        [(rows[..., byte] >> bit) & 15 for byte, bit in (nibble_position(c) for c in range(head_dim))], dim=-1
    )
    params = rows[..., head_dim // 2 :].contiguous().view(torch.float16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(codes.shape, dtype=wide)
    for group, channels in enumerate(group_channels(head_dim, groups)):
        scale, offset = (params[..., 2 * group + i, None].to(wide) for i in range(2))
        out[..., channels] = scale * codes[..., channels].to(wide) + offset
    return out.to(dtype)


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
    """The oracle of ``ops.append_kv``; mutates the caches at ``slots``."""
    groups = groups_of(k_cache)
    k_rows = quantize_rows(transform_keys(k, rotation_order, k_mean, k_inv_scale, k_sign), groups)
    v_rows = quantize_rows(hadamard(v.float(), rotation_order if rotate_v else 1), groups)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot] = k_rows[token]
            v_cache[slot] = v_rows[token]


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_out: Tensor, v_out: Tensor) -> None:
    """The oracle of ``ops.gather_kv``; mutates ``k_out`` and ``v_out``."""
    index = slots.long()
    k_out.copy_(dequantize_rows(k_cache[index], k_out.dtype))
    v_out.copy_(dequantize_rows(v_cache[index], v_out.dtype))


def visible_tokens(seq_len: int, num_rows: int, window: int = -1, tree_mask: list[int] | None = None) -> Tensor:
    """Which tokens each of a request's last rows sees: bool ``[num_rows, seq_len]``."""
    seen = torch.zeros(num_rows, seq_len, dtype=torch.bool)
    first_new = seq_len - num_rows
    for row in range(num_rows):
        position = first_new + row
        for token in range(seq_len):
            if token < first_new:
                visible = True
            elif tree_mask is not None:
                visible = bool((tree_mask[row] >> (token - first_new)) & 1)
            else:
                visible = token <= position
            if window >= 0 and not position - window <= token <= position:
                visible = False
            seen[row, token] = visible
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain attention in float64.

    Args:
        q: ``[n, H_q, D]``; k, v: ``[L, H_kv, D]``; any floating dtype.
        seen: bool ``[n, L]``.
        sinks: ``[H_q]`` extra logits, or None.

    Returns:
        (out ``[n, H_q, D]``, lse ``[n, H_q]``, natural logarithm, sinks included), float64. A row that sees nothing
        is zeros, with lse -inf (the sink alone when there is one).
    """
    n, num_q_heads, head_dim = q.shape
    group = num_q_heads // k.shape[1]
    out = torch.zeros(n, num_q_heads, head_dim, dtype=torch.float64)
    lse = torch.full((n, num_q_heads), -math.inf, dtype=torch.float64)
    for row in range(n):
        tokens = seen[row].nonzero().flatten()
        for head in range(num_q_heads):
            keys, values = k[tokens, head // group].double(), v[tokens, head // group].double()
            logits = (keys @ q[row, head].double()) * sm_scale
            if logit_cap > 0:
                logits = logit_cap * torch.tanh(logits / logit_cap)
            if sinks is not None:
                logits = torch.cat((logits, sinks[head].double().reshape(1)))
                values = torch.cat((values, torch.zeros(1, head_dim, dtype=torch.float64)))
            if len(logits):
                out[row, head] = torch.softmax(logits, 0) @ values
                lse[row, head] = torch.logsumexp(logits, 0)
    return out, lse


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
    rotation_order: int,
    rotate_v: bool = False,
    k_mean: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_sign: Tensor | None = None,
    logit_cap: float = 0.0,
    window: int = -1,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle of ``ops.decode_attention``: (out, lse) in float64, by undoing the transform of the cache.

    Keys are brought back as ``H_R(K' * k_sign) * k_scale + k_mean``, so nothing of the kernels' algebra is assumed.
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for b, seq_len in enumerate(seq_lens.tolist()):
        start = b * max_q_len if q_indptr is None else int(q_indptr[b])
        end = start + max_q_len if q_indptr is None else int(q_indptr[b + 1])
        slots = slot_table[table_rows[b], :seq_len].long()
        k = dequantize_rows(k_cache[slots], torch.float64)
        k = hadamard(k if k_sign is None else k * k_sign.double(), rotation_order)
        v = hadamard(dequantize_rows(v_cache[slots], torch.float64), rotation_order if rotate_v else 1)
        if k_scale is not None:
            k = k * k_scale.double() + k_mean.double()
        rows = min(end - start, seq_len)  # rows before the first token see nothing
        masks = None if tree_mask is None else tree_mask[start:end].tolist()
        if rows == end - start:
            seen = visible_tokens(seq_len, rows, window, masks)
            out[start:end], lse[start:end] = attention(q[start:end], k, v, seen, sm_scale, logit_cap, sinks)
        elif sinks is not None:
            lse[start:end] = sinks.double()
    return out, lse
