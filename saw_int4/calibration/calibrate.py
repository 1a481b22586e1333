"""From a checkpoint to its artifact: what ``saw-int4 calibrate`` runs."""

from __future__ import annotations

import hashlib
import time
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from saw_int4.calibration import artifact, collect, fit
from saw_int4.calibration.artifact import Calibration
from saw_int4.calibration.attention_hook import AttentionCall, load_model
from saw_int4.calibration.fingerprint import model_fingerprint
from saw_int4.calibration.statistics import LayerStatistics
from saw_int4.calibration.text import BUILTIN
from saw_int4.format import FORMAT_VERSION, KVFormat, default_rotation_order, row_bytes

TOKENS = 4096


def calibrate(
    model: str,
    text: str | None = None,
    rotation_order: int | None = None,
    tokens: int = TOKENS,
    device: str = "cpu",
    groups: int = 1,
) -> Calibration:
    """Calibrate a checkpoint.

    Args:
        model: folder of a Hugging Face checkpoint.
        text: what to calibrate on; None: the built-in text.
        rotation_order: 1 for none; None: the largest that head_dim allows.
        tokens: at most so many are used.
        device: where the model runs.
        groups: of the rows that the fit is for.

    Raises:
        ValueError: the model cannot be loaded, has no attention we know, or the text is too short.
    """
    fingerprint = model_fingerprint(model)
    started = time.monotonic()
    network, tokenizer = load_model(model, device)
    ids = tokenizer(text or BUILTIN, return_tensors="pt").input_ids[0][:tokens]
    layers: dict[int, fit.LayerFit] = {}

    def consume(call: AttentionCall, statistics: LayerStatistics) -> None:
        order = rotation_order or default_rotation_order(call.k.shape[-1])
        KVFormat(call.k.shape[-1], order, groups=groups)  # ValueError where they do not fit
        layers[call.layer] = fit.fit_layer(statistics, order, groups)

    opening = collect.first_tokens(tokenizer, ids)
    with tqdm(total=network.config.num_hidden_layers, desc="calibrating", unit="layer") as bar:
        collect.collect(network, ids, opening, consume, progress=lambda done: bar.update(done - bar.n))
    return artifact.build(
        {i: layer.transform for i, layer in layers.items()},
        model=fingerprint,
        rotation_order=rotation_order or default_rotation_order(layers[min(layers)].transform.mean.shape[-1]),
        groups=groups,
        rotate_v=rotating_v_pays(layers),
        text={
            "sha256": hashlib.sha256((text or BUILTIN).encode()).hexdigest(),
            "tokens": len(ids),
            "builtin": text is None,
        },
        software={name: version(name) for name in ("saw-int4", "torch", "transformers", "sglang")},
        seconds=round(time.monotonic() - started, 1),
        statistics=[report(i, layer) for i, layer in layers.items()],
        expected_gain=gain(layers),
    )


def report(index: int, layer: fit.LayerFit) -> dict:
    """One layer of the manifest's statistics."""
    return {
        "layer": index,
        "choice": layer.choice,
        "kl": [round(x, 6) for x in layer.kl],
        "kl_plain": [round(x, 6) for x in layer.kl_plain],
        "v_error": round(layer.v_error, 5),
        "v_error_rotated": round(layer.v_error_rotated, 5),
    }


def rotating_v_pays(layers: dict[int, fit.LayerFit]) -> bool:
    """Whether the held-out attention output is closer to exact with V rotated, over all layers."""
    return sum(layer.v_error_rotated for layer in layers.values()) < sum(layer.v_error for layer in layers.values())


def gain(layers: dict[int, fit.LayerFit]) -> float:
    """How many times smaller the held-out divergence of attention is than with the rotation alone, over all heads."""
    return round(sum(sum(x.kl_plain) for x in layers.values()) / max(sum(sum(x.kl) for x in layers.values()), 1e-12), 3)


def describe(calibration: Calibration) -> str:
    """A few lines for people: the gain, where quantization still hurts most, and what BF16 costs there."""
    manifest = calibration.manifest
    layers = manifest["statistics"]
    heads = [choice for layer in layers for choice in layer["choice"]]
    by_layer = {str(layer["layer"]): sum(layer["kl"]) / len(layer["kl"]) for layer in layers}
    by_head = {f"{layer['layer']}.{h}": kl for layer in layers for h, kl in enumerate(layer["kl"])}
    head_dim = manifest["head_dim"]
    extra = (16 - 8 * row_bytes(head_dim, manifest["groups"]) / head_dim) / len(layers)
    rotated, plain = (sum(layer[key] for layer in layers) / len(layers) for key in ("v_error_rotated", "v_error"))
    return "\n".join(
        [
            f"calibration {calibration.fingerprint} of model {manifest['model']}: {manifest['text']['tokens']} tokens, "
            f"{manifest['seconds']} s",
            f"  heads: {', '.join(f'{heads.count(name)} {name}' for name in (fit.BALANCED, fit.PLAIN))}",
            f"  held-out divergence of attention, summed over heads: {manifest['expected_gain']}x smaller than "
            "with the rotation alone",
            f"  V: relative output error {plain:.4f} plain, {rotated:.4f} rotated: V is "
            f"{'rotated' if manifest['rotate_v'] else 'left as it is'} (--saw-rotation auto)",
            f"  worst layers (nats per head): {_worst(by_layer)}",
            f"  worst heads (layer.head): {_worst(by_head)}",
            f"  a layer kept in BF16 (--saw-bf16-layers) adds {extra:.2f} bits per cached element",
        ]
    )


def _worst(divergence: dict[str, float]) -> str:
    return ", ".join(f"{name}: {divergence[name]:.4f}" for name in sorted(divergence, key=lambda x: -divergence[x])[:5])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def path_of(model: str, rotation_order: int, groups: int = 1, home: Path | None = None) -> Path:
    """Where an artifact is kept when nobody says: one file per model fingerprint, format version, rotation order and
    groups. Another version's is not found, and a server calibrates again."""
    name = f"{model}-v{FORMAT_VERSION}-r{rotation_order}{'' if groups == 1 else f'-g{groups}'}.safetensors"
    return (home or Path.home()) / ".cache" / "saw_int4" / name
