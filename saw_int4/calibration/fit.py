"""From statistics to mu, s and signs, and what they are worth on held-out tokens.

Per KV head and channel, K' = sign * H_R((K - mu) / s)::

    mu    mean of k                      a constant in the keys costs nothing then
    s     near sqrt(std of k / rms of q) noise spread evenly over K' hurts every channel of q' alike, which makes the
                                         result independent of how the checkpoint splits scale between q and k
    sign  and the signs of s             a row's offset is fitted, so that its error has no component along the constant
                                         vector; signs turn that vector to where the queries have most energy and keys
                                         spread most, and s is fitted to what is left (noise.py)

mu is then moved by less than one quantization step, so that the mean first key of a sequence, on which many heads
park most of their attention, falls exactly on the grid of its own row. That key hardly varies between prompts in such
heads, so its error, which would shift every query's largest logit, nearly vanishes.

A head keeps these only where held-out attention is closer to exact with them than with the plain rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saw_int4 import ops
from saw_int4.calibration.noise import least_noise
from saw_int4.calibration.statistics import HeldOut, LayerStatistics
from saw_int4.format import group_of_channel, row_bytes

PLAIN, BALANCED = "plain", "balanced"


class KeyTransform(NamedTuple):
    """One layer's ``K' = sign * H_R((K - mean) / scale)``, ``q' = sign * H_R(q * scale)``; fp32 ``[H_kv, D]``."""

    mean: Tensor
    scale: Tensor
    sign: Tensor

    def forward(self, k: Tensor, rotation_order: int) -> Tensor:
        """Keys fp32 ``[T, H_kv, D]`` into the transformed space."""
        return ops.transform_rows(
            k.contiguous(), rotation_order=rotation_order, mean=self.mean, mul=1 / self.scale, sign=self.sign
        )

    def backward(self, k: Tensor, rotation_order: int) -> Tensor:
        """The way back."""
        return ops.transform_rows(k.contiguous(), rotation_order=rotation_order, mul=self.sign) * self.scale + self.mean

    def queries(self, q: Tensor, rotation_order: int) -> Tensor:
        """Queries fp32 ``[n, H_q, D]`` into the transformed space."""
        return ops.transform_rows(q.contiguous(), rotation_order=rotation_order, mul=self.scale, sign=self.sign)


@dataclass
class LayerFit:
    """One layer's transform and what was measured of it.

    Attributes:
        transform: on CPU.
        choice: per KV head, PLAIN or BALANCED.
        kl: per KV head, mean KL divergence (nats) of held-out attention distributions with this transform.
        kl_plain: the same with the rotation alone.
        v_error, v_error_rotated: relative RMS error of the held-out attention output from V alone.
    """

    transform: KeyTransform
    choice: list[str]
    kl: list[float]
    kl_plain: list[float]
    v_error: float
    v_error_rotated: float


def fit_layer(statistics: LayerStatistics, rotation_order: int, groups: int = 1) -> LayerFit:
    """Fit one layer for one rotation order (1: none) and rows of so many groups."""
    held_out = statistics.held_out
    candidates = {
        PLAIN: plain(statistics),
        BALANCED: align(quiet(statistics, rotation_order, groups), statistics, rotation_order, groups),
    }
    exact = attention_logits(held_out)
    divergence = {name: key_divergence(held_out, exact, c, rotation_order, groups) for name, c in candidates.items()}
    heads = range(statistics.k_mean.shape[0])
    choice = [min(candidates, key=lambda name: float(divergence[name][h])) for h in heads]
    vectors = [torch.stack([candidates[name][i][h] for h, name in enumerate(choice)]).cpu() for i in range(3)]
    return LayerFit(
        transform=KeyTransform(*vectors),
        choice=choice,
        kl=[float(divergence[name][h]) for h, name in enumerate(choice)],
        kl_plain=divergence[PLAIN].tolist(),
        v_error=value_error(held_out, exact, 1, groups),
        v_error_rotated=value_error(held_out, exact, rotation_order, groups),
    )


def plain(statistics: LayerStatistics) -> KeyTransform:
    """The rotation alone."""
    ones = torch.ones_like(statistics.first_key)
    return KeyTransform(torch.zeros_like(ones), ones, ones)


def centred(statistics: LayerStatistics) -> KeyTransform:
    """mu alone."""
    return plain(statistics)._replace(mean=statistics.k_mean.float())


def balanced(statistics: LayerStatistics) -> KeyTransform:
    """mu and s."""
    return centred(statistics)._replace(scale=balance(statistics.k_std, statistics.q_rms).float())


def signed(transform: KeyTransform, statistics: LayerStatistics, rotation_order: int) -> KeyTransform:
    """With the signs of the direction in which the transformed queries have most of their energy."""
    scale = transform.scale.double()
    moment = statistics.q_moment * scale[:, :, None] * scale[:, None, :]
    rotation = rotation_matrix(scale, rotation_order)
    main = torch.linalg.eigh(rotation @ moment @ rotation).eigenvectors[..., -1]
    return transform._replace(sign=torch.where(main >= 0, 1.0, -1.0).float())


def quiet(statistics: LayerStatistics, rotation_order: int, groups: int) -> KeyTransform:
    """mu, s and signs, s and the signs fitted together (noise.py)."""
    transform = balanced(statistics)
    head_dim = transform.scale.shape[1]
    of_channel = torch.tensor([group_of_channel(c, groups) for c in range(head_dim)], device=transform.scale.device)
    scale, sign = least_noise(
        with_live_channels(statistics.k_cov),
        with_live_channels(statistics.q_moment),
        transform.scale.double(),
        rotation_matrix(transform.scale, rotation_order),
        torch.stack([of_channel == group for group in range(groups)]).double(),
    )
    return transform._replace(scale=scale.float(), sign=sign.float())


def rotation_matrix(like: Tensor, rotation_order: int) -> Tensor:
    """H_R float64 ``[D, D]``, for vectors ``[H_kv, D]``, on their device."""
    identity = torch.eye(like.shape[1], dtype=torch.float32, device=like.device)[:, None]
    return ops.transform_rows(identity, rotation_order=rotation_order)[:, 0].double()


def align(transform: KeyTransform, statistics: LayerStatistics, rotation_order: int, groups: int = 1) -> KeyTransform:
    """With mu moved so that the first key is quantized without error.

    The rows of a grid are closed under quantization: where the transformed key is what quantization made of it, doing
    it again changes nothing. So mu takes up the error.
    """
    key = transform.forward(statistics.first_key[None], rotation_order)
    error = ops.transform_rows(round_trip(key, groups) - key, rotation_order=rotation_order, mul=transform.sign)[0]
    return transform._replace(mean=transform.mean - error * transform.scale)


def balance(k_std: Tensor, q_rms: Tensor) -> Tensor:
    """``s`` float64 ``[H_kv, D]``, with the spread of ``k / s`` one on average, far inside the range of fp16.

    A channel that the calibration text left dead (or a whole dead head) gets the floor of its head: s must neither
    vanish nor overflow when another text wakes it.
    """
    k_std = floored(k_std)
    s = (k_std / floored(q_rms)).sqrt()
    return s * (k_std / s).square().mean(-1, keepdim=True).sqrt()


def floored(x: Tensor) -> Tensor:
    """Rms of channels ``[H_kv, D]``, dead ones at the floor of their head."""
    floor = torch.maximum(1e-2 * x.median(-1, keepdim=True).values, 1e-6 * x.amax(-1, keepdim=True))
    return torch.where(floor > 0, torch.maximum(x, floor), torch.ones_like(x))


def with_live_channels(moment: Tensor) -> Tensor:
    """``[H_kv, D, D]`` with the diagonal that ``floored`` gives it."""
    square = moment.diagonal(dim1=-2, dim2=-1)
    return moment + torch.diag_embed(floored(square.sqrt()).square() - square)


def round_trip(x: Tensor, groups: int = 1) -> Tensor:
    """Rows fp32 ``[T, H, D]`` as the cache gives them back; by the operators themselves, so exactly."""
    slots = torch.arange(x.shape[0], device=x.device)
    k_rows, v_rows = (x.new_zeros(*x.shape[:2], row_bytes(x.shape[2], groups), dtype=torch.uint8) for _ in range(2))
    ops.append_kv(x, x, k_rows, v_rows, slots, rotation_order=1)
    out, same = torch.empty_like(x), torch.empty_like(x)
    ops.gather_kv(k_rows, v_rows, slots.int(), out, same)
    return out


def attention_logits(sample: HeldOut) -> Tensor:
    """``[n, H_q, T]``, -inf where unseen."""
    group = sample.q.shape[1] // sample.k.shape[1]
    logits = torch.einsum("nhd,thd->nht", sample.q, sample.k.repeat_interleave(group, 1)) * sample.sm_scale
    return logits.masked_fill(~sample.seen[:, None], float("-inf"))


def key_divergence(
    sample: HeldOut, exact: Tensor, transform: KeyTransform, rotation_order: int, groups: int = 1
) -> Tensor:
    """Per KV head ``[H_kv]``: mean KL(exact attention || attention over quantized keys), nats."""
    keys = transform.forward(sample.k, rotation_order)
    group = sample.q.shape[1] // sample.k.shape[1]
    # The transform is exact, so only the rows' error moves the logits.
    error = (round_trip(keys, groups) - keys).repeat_interleave(group, 1)
    shift = torch.einsum("nhd,thd->nht", transform.queries(sample.q, rotation_order), error)
    quantized = exact + shift * sample.sm_scale
    p = exact.softmax(-1)
    terms = p * (exact.log_softmax(-1) - quantized.log_softmax(-1)).masked_fill(~sample.seen[:, None], 0.0)
    return terms.sum(-1).unflatten(1, (-1, group)).mean((0, 2))


def value_error(sample: HeldOut, exact: Tensor, rotation_order: int, groups: int = 1) -> float:
    """Relative RMS error of the attention output when only V is quantized."""
    group = sample.q.shape[1] // sample.v.shape[1]
    values = ops.transform_rows(sample.v.contiguous(), rotation_order=rotation_order)
    error = (round_trip(values, groups) - values).repeat_interleave(group, 1)
    p = exact.softmax(-1)
    noise = torch.einsum("nht,thd->nhd", p, error)
    signal = torch.einsum("nht,thd->nhd", p, values.repeat_interleave(group, 1))
    return float((noise.square().sum() / signal.square().sum().clamp_min(1e-30)).sqrt())
