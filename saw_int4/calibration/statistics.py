"""What calibration takes from one layer's attention over the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saw_int4.calibration.attention_hook import AttentionCall

FIT_SHARE = 0.75  # of the tokens; the queries of the rest are held out
HELD_OUT_ROWS = 64


@dataclass
class LayerStatistics:
    """Statistics per KV head and channel, and held-out queries to judge a fit by.

    The first key of a sequence is apart: it is what most heads park their attention on and looks like no other key.
    It would distort mean and spread, and deserves an exact place on the quantization grid instead (see fit.py).

    Attributes:
        k_mean: float64 ``[H_kv, D]``, k_cov: float64 ``[H_kv, D, D]``, of keys post-RoPE.
        q_moment: float64 ``[H_kv, D, D]``, mean of ``q q^T`` over the query heads of the group.
        first_key: fp32 ``[H_kv, D]``, the mean key at position 0.
        held_out: queries that took no part.
    """

    k_mean: Tensor
    k_cov: Tensor
    q_moment: Tensor
    first_key: Tensor
    held_out: HeldOut

    @classmethod
    def of(cls, call: AttentionCall, first_key: Tensor) -> LayerStatistics:
        """From the attention over one long sequence: mean keys depend on position, so that short ones would mislead."""
        fitted = round(FIT_SHARE * call.k.shape[0])
        k, q = call.k[1:fitted].double(), call.q[1:fitted].double().unflatten(1, (call.k.shape[1], -1))
        mean = k.mean(0)
        apart = (k - mean).transpose(0, 1)
        q = q.transpose(0, 1).flatten(1, 2)
        return cls(
            k_mean=mean,
            k_cov=apart.mT @ apart / apart.shape[1],
            q_moment=q.mT @ q / q.shape[1],
            first_key=first_key.float(),
            held_out=HeldOut.of(call, fitted),
        )

    @property
    def k_std(self) -> Tensor:
        """``[H_kv, D]`` float64."""
        return self.k_cov.diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def q_rms(self) -> Tensor:
        """``[H_kv, D]`` float64."""
        return self.q_moment.diagonal(dim1=-2, dim2=-1).sqrt()


@dataclass
class HeldOut:
    """Some query rows of a sequence, spread evenly over its end, and all that they attend to. fp32.

    Attributes:
        q: ``[n, H_q, D]``; k, v: ``[T, H_kv, D]``; seen: bool ``[n, T]``; sm_scale multiplies q.k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    sm_scale: float

    @classmethod
    def of(cls, call: AttentionCall, first_row: int) -> HeldOut:
        last = call.q.shape[0] - 1
        rows = (
            torch.linspace(first_row, last, min(HELD_OUT_ROWS, last + 1 - first_row)).round().long().to(call.q.device)
        )
        return cls(call.q[rows].float(), call.k.float(), call.v.float(), call.visible()[rows], call.sm_scale)
