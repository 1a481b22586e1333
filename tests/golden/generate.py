"""Writes tests/golden/rows.txt, and rows_2_groups.txt, from the oracle. Run once for each FORMAT_VERSION: the files are
the frozen format.

A line: name, head_dim, rotation order, calibrated (mean 1/8, inv_scale 3/4 and alternating signs) or plain, the row's
bfloat16 input as hex, the row's bytes as hex.
"""

from pathlib import Path

import torch

from saw_int4 import reference

HERE = Path(__file__).parent


def calibration(head_dim: int) -> dict[str, torch.Tensor]:
    """The vectors of the calibrated lines, [1, head_dim]."""
    signs = torch.tensor([1.0, -1.0, -1.0]).repeat(head_dim)[:head_dim]
    return {
        "k_mean": torch.full((1, head_dim), 0.125),
        "k_inv_scale": torch.full((1, head_dim), 0.75),
        "k_sign": signs[None].contiguous(),
    }


def inputs(head_dim: int) -> dict[str, torch.Tensor]:
    """Rows worth freezing."""
    noise = torch.randn(head_dim, generator=torch.Generator().manual_seed(head_dim))
    outlier = noise.clone()
    outlier[5] = 300.0
    nan = noise.clone()
    nan[3] = float("nan")
    return {
        "noise": noise,
        "outlier": outlier,
        "shifted": noise * 0.25 + 20,
        "tiny": noise * 1e-7,
        "constant": torch.full((head_dim,), -1.75),
        "zero": torch.zeros(head_dim),
        "nan": nan,
        "overflow": noise * 1e6,
    }


def lines_of(groups: int, shapes: tuple[tuple[int, int], ...]) -> list[str]:
    """One line for each row and transform, of every (head_dim, rotation order)."""
    lines = []
    for head_dim, order in shapes:
        for calibrated in (False, True):
            for name, row in inputs(head_dim).items():
                x = row.bfloat16()
                vectors = calibration(head_dim) if calibrated else {}
                renamed = {key.removeprefix("k_"): value for key, value in vectors.items()}
                keys = reference.transform_keys(x[None, None], order, **renamed)
                data = reference.quantize_rows(keys, groups)[0, 0]
                source = x.view(torch.int16).numpy().astype("<i2").tobytes().hex()
                kind = "calibrated" if calibrated else "plain"
                lines.append(f"{name} {head_dim} {order} {kind} {source} {bytes(data.tolist()).hex()}\n")
    return lines


def main() -> None:
    one = lines_of(1, ((16, 16), (64, 1), (64, 64), (80, 16), (128, 16), (128, 128), (256, 256)))
    (HERE / "rows.txt").write_text("".join(one))
    (HERE / "rows_2_groups.txt").write_text("".join(lines_of(2, ((16, 16), (64, 1), (64, 64), (80, 16), (128, 128)))))


if __name__ == "__main__":
    main()
