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

    @classmethod
    def of(cls, fitted, pool) -> KeyTransform:
        """From an artifact's vectors of a layer, on the pool's device. ValueError when they are not of its shape."""
        if tuple(fitted.mean.shape) != (pool.head_num, pool.head_dim):
            raise ValueError(
                f"calibration artifact: a rank's vectors are {tuple(fitted.mean.shape)}, the KV pool has "
                f"{pool.head_num} KV heads of head_dim {pool.head_dim}. Calibrate this model: saw-int4 calibrate."
            )
        mean, scale, sign = (x.to(pool.device) for x in fitted)
        return cls(mean=mean, scale=scale, inv_scale=1 / scale, sign=sign)
