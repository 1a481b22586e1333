"""The INT4 row format: the only Python file that knows the layout (twin: ``csrc/format.h``).

A row holds one (token, KV head) of K, or of V::

    [ codes: head_dim/2 bytes ][ scale: fp16 ][ offset: fp16 ]        x ~ scale * code + offset

or, with two groups, a second pair of parameters, for the last four channels of every word.
``csrc/format.h`` states the order of the codes and the rounding of every step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

FORMAT_VERSION = 2
CODE_MAX = 15
CODES_PER_WORD = 8
MAX_GROUPS = 2
PARAM_BYTES = 4


def code_bytes(head_dim: int) -> int:
    """Bytes of codes in a row."""
    return head_dim // 2


def row_bytes(head_dim: int, groups: int = 1) -> int:
    """Bytes of a row: codes and parameters of one (token, KV head)."""
    return code_bytes(head_dim) + groups * PARAM_BYTES


def word_of_channel(channel: int) -> int:
    """Index of the little-endian 32-bit word of a row that holds a channel's code."""
    return channel // CODES_PER_WORD


def bit_of_channel(channel: int) -> int:
    """Lowest bit of a channel's code inside its word."""
    return 16 * (channel & 1) + 4 * ((channel >> 1) & 3)


def group_of_channel(channel: int, groups: int) -> int:
    """The group whose scale and offset a channel takes."""
    return channel % CODES_PER_WORD * groups // CODES_PER_WORD


def rotation_orders(head_dim: int) -> list[int]:
    """Every rotation order a head_dim allows: the powers of two from 2 that divide it."""
    return [1 << i for i in range(1, head_dim.bit_length()) if head_dim % (1 << i) == 0]


def default_rotation_order(head_dim: int) -> int:
    """The largest order that head_dim allows: head_dim itself when that is a power of two."""
    return rotation_orders(head_dim)[-1]


@dataclass(frozen=True)
class KVFormat:
    """What the bytes of one KV cache mean. Two caches are interchangeable exactly when their fingerprints agree.

    Attributes:
        head_dim: channels of a KV head; a multiple of 16, the same for K and V.
        rotation_order: block size R of the Hadamard rotation of K; 1 is no rotation.
        rotate_v: V is rotated with the same order.
        calibration: fingerprint of the calibrated transform (mu and s), or "none".
        groups: 1, or 2 where 4 more bytes per row buy accuracy: channels that have scale and offset to themselves.

    Raises:
        ValueError: a field is outside what the format allows.
    """

    head_dim: int
    rotation_order: int
    rotate_v: bool = False
    calibration: str = "none"
    groups: int = 1

    def __post_init__(self) -> None:
        if self.head_dim <= 0 or self.head_dim % 16:
            raise ValueError(
                f"int4 KV cache: head_dim is {self.head_dim}, expected a positive multiple of 16. "
                "Serve this model with another --kv-cache-dtype."
            )
        if self.rotation_order != 1 and self.rotation_order not in rotation_orders(self.head_dim):
            raise ValueError(
                f"int4 KV cache: rotation order is {self.rotation_order}, expected 1 (no rotation) or a power of "
                f"two that divides head_dim {self.head_dim}: {rotation_orders(self.head_dim)}."
            )
        if self.groups not in range(1, MAX_GROUPS + 1):
            raise ValueError(f"int4 KV cache: groups per row is {self.groups}, expected 1 or {MAX_GROUPS}.")
        if self.rotate_v and self.rotation_order == 1:
            raise ValueError(
                "int4 KV cache: rotation of V was asked for with rotation order 1 (none). "
                f"Choose an order of {rotation_orders(self.head_dim)}, or leave V unrotated."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one (token, KV head) of K, and again of V."""
        return row_bytes(self.head_dim, self.groups)

    @property
    def bits_per_element(self) -> float:
        """Bits per cached element, parameters included."""
        return 8 * self.row_bytes / self.head_dim

    @property
    def capacity_ratio(self) -> float:
        """Tokens held in the bytes in which a 16-bit cache holds one."""
        return 16 / self.bits_per_element

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that decides what the bytes mean."""
        fields = (FORMAT_VERSION, self.head_dim, self.rotation_order, self.rotate_v, self.calibration)
        fields += () if self.groups == 1 else (self.groups,)  # caches of one group are known by fingerprints without
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line for logs and server info."""
        if self.rotation_order == 1:
            rotation = "no rotation"
        else:
            rotation = f"{'K and V' if self.rotate_v else 'K'} rotated, order {self.rotation_order}"
        return (
            f"int4 v{FORMAT_VERSION}: head_dim {self.head_dim}, row {self.row_bytes} bytes, "
            f"{self.bits_per_element:.3f} bits per element, {self.capacity_ratio:.2f}x the tokens of a 16-bit cache, "
            f"{rotation}, {'' if self.groups == 1 else f'{self.groups} groups per row, '}"
            f"calibration {self.calibration}, fingerprint {self.fingerprint}"
        )
