"""The ``saw-int4 calibrate`` sub-command."""

from __future__ import annotations

import argparse
from pathlib import Path

from saw_int4.format import default_rotation_order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--text", type=Path, help="text to calibrate on (default: a built-in one; any will do)")
    parser.add_argument("--out", type=Path, help="artifact to write (default: one per model in ~/.cache/saw_int4)")
    parser.add_argument("--rotation-order", type=int, help="1 for none (default: the largest head_dim allows)")
    parser.add_argument("--groups", type=int, choices=(1, 2), default=1, help="scales per row (default: 1)")
    parser.add_argument("--tokens", type=int, default=4096, help="at most so many tokens of the text (default: 4096)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")


def run(args: argparse.Namespace) -> None:
    """Calibrate, write the artifact, and say what it gained. ValueError where it cannot."""
    from saw_int4.calibration import artifact
    from saw_int4.calibration.calibrate import calibrate, describe, path_of

    text = None if args.text is None else args.text.read_text()
    calibration = calibrate(args.model, text, args.rotation_order, args.tokens, args.device, args.groups)
    manifest = calibration.manifest
    out = args.out or path_of(manifest["model"], manifest["rotation_order"], manifest["groups"])
    artifact.save(calibration, out)
    print(describe(calibration))
    print(
        f"written to {out}; serve with: saw-int4 serve --model-path {args.model} --kv-cache-dtype int4 "
        f"--saw-calibration {out}" + _format_flags(manifest)
    )


def _format_flags(manifest: dict) -> str:
    order, groups = manifest["rotation_order"], manifest["groups"]
    flags = "" if groups == 1 else f" --saw-groups {groups}"
    if order == 1:
        return flags + " --saw-rotation none"
    return flags if order == default_rotation_order(manifest["head_dim"]) else f"{flags} --saw-rotation-order {order}"
