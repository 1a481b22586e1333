"""The calibration artifact: one safetensors file, its manifest inside as metadata.

It holds the vectors of every KV head of the model; a rank takes its own part, so that one file serves any TP size.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from saw_int4.calibration.fit import KeyTransform
from saw_int4.format import FORMAT_VERSION

ARTIFACT_VERSION = 2
MANIFEST = "saw_int4_calibration"


@dataclass(frozen=True)
class Calibration:
    """The key transform of every attention layer.

    Attributes:
        layers: layer index -> mu, s and signs, fp32 ``[H_kv, D]`` each, all KV heads of the model, on CPU.
        manifest: what they belong to and how they came about; see ``build``.
    """

    layers: dict[int, KeyTransform]
    manifest: dict

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the vectors: what ``KVFormat.calibration`` carries."""
        return self.manifest["hash"][:16]

    def rank(self, layer: int, tp_rank: int, tp_size: int) -> KeyTransform:
        """The transform of the KV heads that a tensor-parallel rank holds, ``[max(1, H_kv / tp_size), D]`` each.

        Ranks outnumbering the heads share them, as consecutive ranks do in SGLang.

        Raises:
            ValueError: the layer is not in the artifact, or heads and ranks do not divide.
        """
        if layer not in self.layers:
            raise ValueError(
                f"calibration artifact: layer {layer} is not in it, it has {sorted(self.layers)}. "
                "Calibrate this model: saw-int4 calibrate --model PATH."
            )
        heads = self.layers[layer].mean.shape[0]
        if max(heads, tp_size) % min(heads, tp_size):
            raise ValueError(f"calibration artifact: {heads} KV heads cannot be dealt out to {tp_size} ranks.")
        per_rank = max(1, heads // tp_size)
        start = tp_rank * heads // tp_size
        return KeyTransform(*(vector[start : start + per_rank].contiguous() for vector in self.layers[layer]))

    def check(self, **expected) -> None:
        """Compare manifest fields with what the server has: model, format_version, head_dim, num_kv_heads, ...

        Raises:
            ValueError: naming the first field that differs.
        """
        for field, value in expected.items():
            if self.manifest[field] != value:
                raise ValueError(
                    f"calibration artifact: {field} is {self.manifest[field]!r}, the server has {value!r}. "
                    "Calibrate for this server (saw-int4 calibrate --model PATH), or serve without calibration "
                    "(--saw-calibration none)."
                )


def build(layers: dict[int, KeyTransform], **manifest) -> Calibration:
    """A calibration from its transforms, shapes and hash filled in.

    Args:
        manifest: at least ``model`` (fingerprint), ``rotation_order`` and ``rotate_v``; any JSON values. ``groups``
            of the rows that it was fitted for: 1 when not given.
    """
    heads, head_dim = next(iter(layers.values())).mean.shape
    manifest = {
        "artifact_version": ARTIFACT_VERSION,
        "format_version": FORMAT_VERSION,
        "layers": sorted(layers),
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "groups": 1,
        **manifest,
    }
    manifest["hash"] = _hash(layers, manifest["rotation_order"])
    return Calibration(layers, manifest)


def save(calibration: Calibration, path: Path) -> None:
    """Write the artifact; whole or not at all."""
    from safetensors.torch import save_file

    tensors = {
        f"layers.{layer}.k_{name}": vector.contiguous()
        for layer, transform in calibration.layers.items()
        for name, vector in transform._asdict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # servers may start at the same time
    save_file(tensors, partial, metadata={MANIFEST: json.dumps(calibration.manifest, sort_keys=True)})
    partial.replace(path)


def load(path: Path) -> Calibration:
    """Read an artifact.

    Raises:
        ValueError: not an artifact, of another version, damaged, or with vectors out of range.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"calibration artifact {path}: cannot be read ({error}). Write one: saw-int4 calibrate."
        ) from error
    if MANIFEST not in metadata:
        raise ValueError(f"calibration artifact {path}: it has no manifest; expected a file of saw-int4 calibrate.")
    manifest = json.loads(metadata[MANIFEST])
    for field, value in (("artifact_version", ARTIFACT_VERSION), ("format_version", FORMAT_VERSION)):
        if manifest.get(field) != value:
            raise ValueError(
                f"calibration artifact {path}: {field} is {manifest.get(field)}, this version reads {value}. "
                "Calibrate again: saw-int4 calibrate."
            )
    layers = {
        layer: KeyTransform(*(tensors[f"layers.{layer}.k_{name}"] for name in KeyTransform._fields))
        for layer in manifest["layers"]
    }
    found = _hash(layers, manifest["rotation_order"])
    if found != manifest["hash"]:
        raise ValueError(
            f"calibration artifact {path}: hash is {found}, its manifest says {manifest['hash']}: damaged."
        )
    for layer, (mean, scale, sign) in layers.items():
        if not (mean.isfinite().all() and scale.isfinite().all() and (scale != 0).all() and (sign.abs() == 1).all()):
            raise ValueError(
                f"calibration artifact {path}: layer {layer} has values out of range, expected finite mean, finite "
                "scale other than 0, and signs of +1 or -1. Calibrate again: saw-int4 calibrate."
            )
    return Calibration(layers, manifest)


@lru_cache(maxsize=4)
def load_once(path: str) -> Calibration:
    """``load``, once per process: what a server uses must not change under it."""
    return load(Path(path))


def _hash(layers: dict[int, KeyTransform], rotation_order: int) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {rotation_order}".encode())
    for layer in sorted(layers):
        for vector in layers[layer]:
            digest.update(f"{layer} {tuple(vector.shape)}".encode())
            digest.update(vector.to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
