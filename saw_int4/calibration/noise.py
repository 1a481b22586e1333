"""The s and signs that let the rounding of keys disturb logits least, fitted together.

Keys are stored as K' = sign * H(flip * (K - mu) / s), the flips being signs of s. Rounding errors of a row are alike in
all channels and as large as its spread, but they have no component along the constant vector of a group of channels,
whose offset is fitted; nor does what a key has along it make the spread larger. Back in the channels of K that vector
is w = flip * H(sign * 1_group), a direction that is free. So the noise in logits is as large as

    [tr(C / s s^T) - sum_g w_g^T (C / s s^T) w_g / n_g] * [tr(M * s s^T) - sum_g w_g^T (M * s s^T) w_g / n_g]

with C the covariance of keys, M the second moment of queries and n_g the channels of a group. It is made small in
turns: signs and flips, from many random ones, by a step that never makes it larger (its logarithm lies below its
tangent, and a convex form is largest at the signs of its gradient); s by a fixed point of its stationary condition.
"""

from __future__ import annotations

import torch
from torch import Tensor

STARTS = 64
SIGN_STEPS = 24
SCALE_STEPS = 30
ROUNDS = 4


def least_noise(
    k_cov: Tensor, q_moment: Tensor, scale: Tensor, rotation: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """s with flips, and signs, float64 ``[H_kv, D]``.

    Args:
        k_cov, q_moment: float64 ``[H_kv, D, D]``.
        scale: ``[H_kv, D]``, the s to begin with.
        rotation: float64 ``[D, D]``, H.
        groups: float64 ``[groups, D]``, 1 where a channel is the group's.
    """
    heads, head_dim = scale.shape
    # The generator is the CPU's and its draw the same for all heads: a fit depends on no device and on no other head.
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(2, STARTS, head_dim, generator=generator).to(scale.device) < 0.5
    flip, sign = (torch.where(x, -1.0, 1.0).double().expand(heads, -1, -1) for x in draw)
    grid = _Grid(rotation, groups)
    # In units of the first s, whatever scale a checkpoint gives to k and to q.
    keys, queries = k_cov / _outer(scale), q_moment * _outer(scale)
    change = torch.ones_like(scale)
    for _ in range(ROUNDS):
        flip, sign = grid.turn(keys / _outer(change), queries * _outer(change), flip, sign)
        noise = torch.log(
            grid.rest(keys / _outer(change), flip, sign) * grid.rest(queries * _outer(change), flip, sign)
        )
        best = noise.argmin(1)[:, None, None].expand(-1, 1, head_dim)
        flip, sign = flip.gather(1, best), sign.gather(1, best)
        change = grid.stretch(keys, queries, change, flip[:, 0], sign[:, 0])
    return scale * change * flip[:, 0], sign[:, 0]


class _Grid:
    """The free directions of rows, and what they leave of a moment ``[H_kv, D, D]``; signs are ``[H_kv, n, D]``."""

    def __init__(self, rotation: Tensor, groups: Tensor) -> None:
        self.rotation, self.groups, self.sizes = rotation, groups, groups.sum(-1)

    def rotated(self, sign: Tensor) -> Tensor:
        """H(sign * 1_group) ``[H_kv, n, groups, D]``."""
        return (sign[..., None, :] * self.groups) @ self.rotation

    def free(self, moment: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """moment w, and the moment that lies along w ``[H_kv, n]``."""
        product = (w.flatten(1, 2) @ moment).view_as(w)  # one product per head: broadcasting would copy the moment
        return product, ((product * w).sum(-1) / self.sizes).sum(-1)

    def rest(self, moment: Tensor, flip: Tensor, sign: Tensor) -> Tensor:
        """The moment outside the free directions ``[H_kv, n]``."""
        along = self.free(moment, flip[..., None, :] * self.rotated(sign))[1]
        return moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None] - along

    def pull(self, keys: Tensor, queries: Tensor, w: Tensor) -> Tensor:
        """Where w would go to leave less of both ``[H_kv, n, groups, D]``."""
        pulls = 0.0
        for moment in (keys, queries):
            product, along = self.free(moment, w)
            rest = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None] - along
            pulls = pulls + product / rest[..., None, None]
        return pulls

    def turn(self, keys: Tensor, queries: Tensor, flip: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Flips and signs that leave less."""
        for _ in range(SIGN_STEPS):
            pull = self.pull(keys, queries, flip[..., None, :] * self.rotated(sign))
            sign = _signs(((pull * flip[..., None, :]) @ self.rotation * self.groups).sum(-2))
            rotated = self.rotated(sign)
            pull = self.pull(keys, queries, flip[..., None, :] * rotated)
            flip = _signs((pull * rotated / self.sizes[:, None]).sum(-2))
        return flip, sign

    def stretch(self, keys: Tensor, queries: Tensor, scale: Tensor, flip: Tensor, sign: Tensor) -> Tensor:
        """s that leaves less, ``[H_kv, D]``: every channel's share of what is left of keys and of queries is equal."""
        w = flip[:, None] * self.rotated(sign)
        outside = torch.eye(scale.shape[-1], dtype=w.dtype, device=w.device) - w.mT @ (w / self.sizes[:, None])
        for _ in range(SCALE_STEPS):
            shares = []
            for moment in (keys / _outer(scale), queries * _outer(scale)):
                share = (moment * outside).sum(-1)
                shares.append((share / share.sum(-1, keepdim=True)).clamp_min(1e-6))
            scale = scale * (shares[0] / shares[1]).clamp(0.25, 4.0) ** 0.125
        return scale.clamp(1 / 8, 8)  # of the s to begin with


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _outer(s: Tensor) -> Tensor:
    return s[..., :, None] * s[..., None, :]
