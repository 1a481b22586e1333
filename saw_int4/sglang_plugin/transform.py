"""The exact transform of one layer's keys on this rank.

K' = sign * H_R((K - mean) * inv_scale) is stored, q' = sign * H_R(q * scale) asks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KeyTransform:
    """Calibrated vectors of one layer, fp32 ``[H_kv, D]`` with this rank's KV heads; all None without calibration."""

    mean: Tensor | None = None
    scale: Tensor | None = None
    inv_scale: Tensor | None = None
    sign: Tensor | None = None
