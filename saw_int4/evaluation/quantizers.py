"""Ways of storing K and V, as functions: what went in, what attention would read back.

A quantizer takes ``(layer, k, v)``, each ``[T, H_kv, D]`` in the model's dtype, keys post-RoPE, and returns the two
in float32. Rows are quantized token by token, so that it does not matter how often a token passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saw_int4 import ops
from saw_int4.calibration.fit import KeyTransform
from saw_int4.calibration.statistics import LayerStatistics
from saw_int4.format import row_bytes

Quantizer = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
Transforms = dict[int, KeyTransform]


@dataclass
class LayerSample:
    """What comparators learn from, of one layer: calibration keys and values, and the queries' second moments.

    Attributes:
        statistics: as calibration sees them.
        k, v: fp32 ``[n, H_kv, D]``, thinned.
    """

    statistics: LayerStatistics
    k: Tensor
    v: Tensor


def int4_rows(order: int, rotate_v: bool = False, transforms: Transforms | None = None, groups: int = 1) -> Quantizer:
    """This package's format, by its own operators. ``transforms``: by layer; None: the rotation alone."""

    def quantize(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options = {}
        if transforms is not None:
            transform = KeyTransform(*(vector.to(k.device) for vector in transforms[layer]))
            options = dict(k_mean=transform.mean, k_inv_scale=1 / transform.scale, k_sign=transform.sign)
        tokens, heads, head_dim = k.shape
        shape = (tokens, heads, row_bytes(head_dim, groups))
        k_rows, v_rows = (k.new_zeros(shape, dtype=torch.uint8) for _ in range(2))
        slots = torch.arange(tokens, device=k.device)
        ops.append_kv(
            k.contiguous(), v.contiguous(), k_rows, v_rows, slots, rotation_order=order, rotate_v=rotate_v, **options
        )
        k_out, v_out = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
        ops.gather_kv(k_rows, v_rows, slots.int(), k_out, v_out)
        keys = (
            ops.transform_rows(k_out, rotation_order=order) if transforms is None else transform.backward(k_out, order)
        )
        return keys, ops.transform_rows(v_out, rotation_order=order if rotate_v else 1)

    return quantize


def fp8() -> Quantizer:
    """E4M3 without a scale, as engines store it by default."""

    def cast(x: Tensor) -> Tensor:
        limit = torch.finfo(torch.float8_e4m3fn).max
        return x.float().clamp(-limit, limit).to(torch.float8_e4m3fn).float()

    return lambda layer, k, v: (cast(k), cast(v))


def uniform(x: Tensor, levels: int = 15) -> Tensor:
    """Min-max rounding of fp32 ``[..., D]`` with fp16 scale and offset per row, as published."""
    return _round(x, levels)[0]


def fitted(x: Tensor) -> Tensor:
    """4 bits from the smallest to the largest value of a row, then scale and offset fitted to the codes by least
    squares."""
    _, codes, scale = _round(x, 15)
    centred = codes - codes.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True)
    scale = torch.where(variance > 0, (centred * x).sum(-1, keepdim=True) / variance.clamp_min(1.0), scale)
    scale = scale.half().float()
    offset = (x.mean(-1, keepdim=True) - scale * codes.mean(-1, keepdim=True)).half().float()
    return codes * scale + offset


def _round(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rounded, codes, scale) of rows over their range."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    offset = low.half().float()
    scale = ((high - low) / levels).half().float()
    codes = torch.where(scale > 0, ((x - offset) / scale).round().clamp(0, levels), torch.zeros_like(x))
    return codes * scale + offset, codes, scale


def rotated(order: int, rotate_v: bool, rounding: Callable[[Tensor], Tensor], transforms: Transforms) -> Quantizer:
    """Another rounding in the transformed space."""

    def quantize(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        transform = KeyTransform(*(vector.to(k.device) for vector in transforms[layer]))
        keys = transform.backward(rounding(transform.forward(k.float(), order)), order)
        v_order = order if rotate_v else 1
        values = rounding(ops.transform_rows(v.float().contiguous(), rotation_order=v_order))
        return keys, ops.transform_rows(values, rotation_order=v_order)

    return quantize


def kmeans(samples: dict[int, LayerSample], order: int, channels: int) -> Quantizer:
    """K-means codebooks per (layer, KV head) over ``channels`` adjacent channels of rows normalized per token.

    16 centroids for one channel, 256 for two: 4 bits per element either way, plus fp16 mean and RMS per row.
    """
    books = {
        layer: tuple(
            _codebook(_normalized(ops.transform_rows(x, rotation_order=order))[0], channels) for x in (s.k, s.v)
        )
        for layer, s in samples.items()
    }

    def through(x: Tensor, book: Tensor) -> Tensor:
        unit, mean, rms = _normalized(ops.transform_rows(x.float().contiguous(), rotation_order=order))
        points = unit.unflatten(-1, (-1, channels))
        out = torch.stack([book[h][_nearest(points[:, h], book[h])] for h in range(x.shape[1])], 1).flatten(-2)
        return ops.transform_rows(out * rms + mean, rotation_order=order)

    return lambda layer, k, v: (through(k, books[layer][0]), through(v, books[layer][1]))


def _normalized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True).half().float()
    rms = (x - mean).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6).half().float()
    return (x - mean) / rms, mean, rms


def _nearest(points: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest centroid: points ``[..., c]``, book ``[n, c]``."""
    return torch.cdist(points.reshape(-1, points.shape[-1]), book).argmin(-1).reshape(points.shape[:-1])


def _codebook(unit: Tensor, channels: int, rounds: int = 12) -> Tensor:
    """Lloyd's algorithm per head: ``[n, H, D]`` -> ``[H, 16**channels, channels]``."""
    size = 16**channels
    books = []
    for head in range(unit.shape[1]):
        points = unit[:, head].reshape(-1, channels)
        pick = torch.randperm(len(points), generator=torch.Generator().manual_seed(head))[: max(4096, size)]
        points = points[pick.to(points.device)]
        book = points[:size].clone()
        for _ in range(rounds):
            nearest = _nearest(points, book)
            count = torch.bincount(nearest, minlength=size)[:, None]
            sums = torch.zeros_like(book).index_add_(0, nearest, points)
            book = torch.where(count > 0, sums / count.clamp_min(1), book)
        books.append(book)
    return torch.stack(books)


def gptq(samples: dict[int, LayerSample], order: int) -> Quantizer:
    """Hessian-aware rounding of rotated keys: each channel's error is fed to the channels not yet rounded.

    The Hessian of a logit's squared error is the queries' second moment (GPTQ, on the cache). V is rounded plainly.
    """
    factors = {}
    for layer, sample in samples.items():
        head_dim = sample.k.shape[-1]
        rotate = ops.transform_rows(torch.eye(head_dim)[:, None].contiguous(), rotation_order=order)[:, 0].double()
        hessian = rotate @ sample.statistics.q_moment @ rotate
        damping = 0.01 * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        inverse = torch.linalg.inv(hessian + damping * torch.eye(head_dim, dtype=torch.float64))
        factors[layer] = torch.linalg.cholesky(inverse, upper=True).float()

    def quantize(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.transform_rows(k.float().contiguous(), rotation_order=order)
        offset = x.amin(-1).half().float()
        scale = ((x.amax(-1) - x.amin(-1)) / 15).half().float().clamp_min(1e-8)
        upper, out, rest = factors[layer].to(k.device), torch.empty_like(x), x.clone()
        for channel in range(x.shape[-1]):
            value = rest[..., channel]
            out[..., channel] = ((value - offset) / scale).round().clamp(0, 15) * scale + offset
            error = (value - out[..., channel]) / upper[:, channel, channel]
            rest[..., channel + 1 :] -= error[..., None] * upper[:, channel, channel + 1 :]
        return ops.transform_rows(out, rotation_order=order), uniform(v.float())

    return quantize


def mixed_precision(samples: dict[int, LayerSample], share: float) -> Quantizer:
    """The ``share`` of key channels that spread most, per head, in 8 bits, the others in 4; V in 4 (as Kitty does)."""
    wide = {}
    for layer, sample in samples.items():
        spread = sample.statistics.k_std
        count = round(share * spread.shape[1])
        wide[layer] = torch.zeros_like(spread, dtype=torch.bool).scatter_(1, spread.topk(count, 1).indices, True)

    def quantize(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(k.shape, dtype=torch.float32, device=k.device)
        for head, mask in enumerate(wide[layer].to(k.device)):
            out[:, head, mask] = uniform(k[:, head, mask].float(), levels=255)
            out[:, head, ~mask] = uniform(k[:, head, ~mask].float())
        return out, uniform(v.float())

    return quantize


def except_layers(quantizer: Quantizer, kept: set[int]) -> Quantizer:
    """Leave some layers in the model's dtype."""
    return lambda layer, k, v: (k.float(), v.float()) if layer in kept else quantizer(layer, k, v)


def only_layer(quantizer: Quantizer, layer_index: int) -> Quantizer:
    """Quantize one layer alone."""
    return lambda layer, k, v: quantizer(layer, k, v) if layer == layer_index else (k.float(), v.float())
