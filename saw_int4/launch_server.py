"""``python -m saw_int4.launch_server``: SGLang's server with our options as flags.

Every flag of ``sglang serve`` is handed on. Without a GPU the server runs on plain CPU.
"""

from __future__ import annotations

import argparse
import os
import sys

from saw_int4 import env
from saw_int4.torchvision_compat import define_missing_operators

define_missing_operators()  # here, so that processes spawned from this one have them before they import sglang


def parser() -> argparse.ArgumentParser:
    """Our own flags; everything else is SGLang's."""
    flags = argparse.ArgumentParser(prog="saw-int4 serve", add_help=False, allow_abbrev=False)
    flags.add_argument(
        "--saw-rotation",
        choices=env.ROTATIONS,
        help="what the Hadamard rotation covers before quantization: nothing, keys, or keys and values; auto: keys, "
        "and values where calibration found that it pays (default: auto)",
    )
    flags.add_argument(
        "--saw-rotation-order",
        metavar="R",
        help="block of the rotation: a power of two that divides head_dim, or head_dim (default: head_dim)",
    )
    flags.add_argument(
        "--saw-calibration",
        metavar="auto|none|PATH",
        help="auto: calibrate when a model is first served; none: the rotation alone; PATH: an artifact of "
        "saw-int4 calibrate (default: auto)",
    )
    flags.add_argument(
        "--saw-groups",
        choices=("1", "2"),
        help="scales and offsets per row of a head: two are more exact, and take 4 bytes more (default: 1)",
    )
    flags.add_argument(
        "--saw-bf16-layers",
        metavar="LAYERS",
        help="layers that stay in BF16: numbers, ranges, first:N, last:N, separated by commas (default: none of them)",
    )
    return flags


VARIABLES = {
    "saw_rotation": env.ROTATION,
    "saw_rotation_order": env.ROTATION_ORDER,
    "saw_calibration": env.CALIBRATION,
    "saw_groups": env.GROUPS,
    "saw_bf16_layers": env.BF16_LAYERS,
}


def main(argv: list[str] | None = None) -> None:
    """Start the server; returns when it ends."""
    argv = sys.argv[1:] if argv is None else argv
    ours, theirs = parser().parse_known_args(argv)
    for flag, variable in VARIABLES.items():
        value = getattr(ours, flag)
        if value is None:
            continue
        if os.environ.get(variable, value) != value:
            raise SystemExit(
                f"saw_int4: --{flag.replace('_', '-')} is {value!r}, {variable} is {os.environ[variable]!r}. "
                "Leave one of them out."
            )
        os.environ[variable] = value
    if not {"-h", "--help"}.isdisjoint(theirs):
        print(parser().format_help(), "\nSGLang's own flags:\n", sep="", flush=True)
    choose_platform()

    from saw_int4.sglang_plugin.launch import run

    run(theirs)


def choose_platform() -> None:
    """Ask for the CPU platform where torch sees no accelerator and nobody chose a platform."""
    import torch

    chosen = any(name in os.environ for name in (env.CPU_PLATFORM, "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"))
    if not chosen and not torch.accelerator.is_available():
        os.environ[env.CPU_PLATFORM] = "1"


if __name__ == "__main__":
    main()
