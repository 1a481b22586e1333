"""The ladder's rungs, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from saw_int4 import layers
from saw_int4.calibration import fit
from saw_int4.evaluation import quantizers as q
from saw_int4.evaluation.quantizers import LayerSample, Quantizer
from saw_int4.format import KVFormat, default_rotation_order, rotation_orders

Samples = dict[int, LayerSample]


@dataclass(frozen=True)
class Method:
    """One way of storing the cache.

    Attributes:
        name: as on the command line.
        title: for people.
        bits: bits per cached element, parameters included, from (head_dim, number of layers).
        cost: what decode pays beside reading the bytes.
        build: its quantizer from calibration samples; None: nothing is quantized.
        ours: in this package's format, through its own operators.
    """

    name: str
    title: str
    bits: Callable[[int, int], float]
    cost: str
    build: Callable[[Samples], Quantizer] | None
    ours: bool = False


def keeping(method: Method, text: str, num_layers: int) -> Method:
    """The same with some layers in BF16: ``text`` as ``saw_int4.layers`` reads it, ``+`` for its commas.

    Raises:
        ValueError: the text names no layers of this model, or the method quantizes nothing.
    """
    kept = set(layers.chosen(text.replace("+", ","), num_layers))
    if method.build is None or not kept:
        raise ValueError(f"method {method.name}@{text}: no quantized method with layers in BF16; calibrated-kv@0+5 is.")
    return replace(
        method,
        name=f"{method.name}@{text}",
        title=f"{method.title}; layers {text} in BF16",
        bits=lambda d, n: (16 * len(kept) + method.bits(d, n) * (n - len(kept))) / n,
        build=lambda samples: q.except_layers(method.build(samples), kept),
    )


def methods(head_dim: int) -> dict[str, Method]:
    """Every method that this head_dim allows, from most to fewest bits and from plain to elaborate."""
    full = default_rotation_order(head_dim)

    def row(head_dim: int, num_layers: int) -> float:
        return KVFormat(head_dim, 1).bits_per_element

    def row_of_two_groups(head_dim: int, num_layers: int) -> float:
        return KVFormat(head_dim, 1, groups=2).bits_per_element

    def transforms(samples: Samples, *steps: Callable) -> q.Transforms:
        found = {}
        for layer, sample in samples.items():
            transform = steps[0](sample.statistics)
            for step in steps[1:]:
                transform = step(transform, sample.statistics, full)
            found[layer] = transform
        return found

    def calibrated(samples: Samples, groups: int = 1) -> q.Transforms:
        return {layer: fit.fit_layer(sample.statistics, full, groups).transform for layer, sample in samples.items()}

    def rows(*steps: Callable, order: int = full, rotate_v: bool = False) -> Callable[[Samples], Quantizer]:
        return lambda s: q.int4_rows(order, rotate_v, transforms(s, *steps) if steps else None)

    def ours(rotate_v: bool, groups: int = 1) -> Callable[[Samples], Quantizer]:
        return lambda s: q.int4_rows(full, rotate_v, calibrated(s, groups), groups)

    def published(order: int, rotate_v: bool = False) -> Callable[[Samples], Quantizer]:
        return lambda s: q.rotated(order, rotate_v, q.uniform, transforms(s, fit.plain))

    free, rotation = "none", "q rotated once per query row"
    both = rotation + ", output too"
    steps = (fit.balanced, fit.signed, fit.align)
    found = [
        Method("bf16", "BF16", lambda d, n: 16.0, free, None),
        Method("fp8", "FP8 E4M3", lambda d, n: 8.0, "conversion", lambda s: q.fp8()),
        Method("int4", "INT4, no rotation", row, free, rows(order=1), ours=True),
        *(
            Method(f"bdr-{order}", f"BDR {order} on K", row, rotation, rows(order=order), ours=True)
            for order in rotation_orders(head_dim)
            if order >= 16
        ),
        Method("bdr-kv", f"BDR {full} on K and V", row, both, rows(rotate_v=True), ours=True),
        Method("int4-minmax", "INT4 as published, no rotation", row, free, published(1)),
        Method("bdr-minmax", f"BDR {full} on K as published", row, rotation, published(full)),
        Method("bdr-kv-minmax", f"BDR {full} on K and V as published", row, both, published(full, True)),
        Method("centred", "BDR K, centred", row, rotation, rows(fit.centred), ours=True),
        Method("balanced", "BDR K, centred and balanced", row, rotation, rows(fit.balanced), ours=True),
        Method("signed", "the same, signs", row, rotation, rows(fit.balanced, fit.signed), ours=True),
        Method("aligned", "the same, first key on the grid", row, rotation, rows(*steps), ours=True),
        Method("aligned-kv", "the same, V rotated", row, both, rows(*steps, rotate_v=True), ours=True),
        Method("calibrated", "calibrated: the best per head", row, rotation, ours(False), ours=True),
        Method("calibrated-kv", "calibrated, V rotated", row, both, ours(True), ours=True),
        Method(
            "calibrated-kv-2g",
            "the same, two groups per row",
            row_of_two_groups,
            both + "; two parameter pairs per row",
            ours(True, groups=2),
            ours=True,
        ),
        Method(
            "fixed-grid",
            "calibrated, V rotated, rows of format version 1: one grid, from the smallest to the largest value",
            row,
            both,
            lambda s: q.rotated(full, True, q.fitted, calibrated(s)),
        ),
        Method("gptq", "Hessian-aware rounding, BDR K", row, rotation, lambda s: q.gptq(s, full)),
        Method("kmeans-16", "K-means, 16 centroids", row, "codebook look-up", lambda s: q.kmeans(s, 1, 1)),
        Method("kmeans-16-bdr", "K-means, 16, rotated", row, "codebook look-up", lambda s: q.kmeans(s, full, 1)),
        Method("kmeans-256", "K-means, 256 for channel pairs", row, "codebook look-up", lambda s: q.kmeans(s, 1, 2)),
        Method("kmeans-256-bdr", "K-means, 256, rotated", row, "codebook look-up", lambda s: q.kmeans(s, full, 2)),
        Method(
            "mixed",
            "one key channel in 8 at 8 bits",
            lambda d, n: ((4.5 + 64 / d) + (4 + 32 / d)) / 2,
            "gather of channels, two widths",
            lambda s: q.mixed_precision(s, 1 / 8),
        ),
    ]
    return {method.name: method for method in found}
