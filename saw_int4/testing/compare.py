"""Comparisons that say where two tensors differ most."""

from __future__ import annotations

import torch
from torch import Tensor

from saw_int4 import reference
from saw_int4.testing.cases import DecodeInputs, sixteen_bit_error


def _where(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def assert_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Raise AssertionError unless both hold the same values (NaN equals NaN), naming the first difference."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{what}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
    )
    differs = actual != expected
    if actual.is_floating_point():
        differs &= ~(actual.isnan() & expected.isnan())
    if differs.any():
        at = _where(int(differs.flatten().nonzero()[0]), actual.shape)
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} values differ, the first at {at}: "
            f"{actual[at].item()}, expected {expected[at].item()}"
        )


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "result") -> None:
    """Raise AssertionError unless ``|actual - expected| <= tolerance`` everywhere, naming the worst coordinate.

    NaN and infinities must stand in the same places.
    """
    actual, expected = actual.cpu().double(), expected.cpu().double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    special = ~(actual.isfinite() & expected.isfinite())
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(special, torch.where(same, 0.0, torch.inf), (actual - expected).abs())
    if error.numel() and float(error.max()) > tolerance:
        at = _where(int(error.argmax()), error.shape)
        raise AssertionError(
            f"{what}: {int((error > tolerance).sum())} of {error.numel()} values are off by more than {tolerance:.3g}, "
            f"the worst at {at}: {actual[at].item():.6g}, expected {expected[at].item():.6g}"
        )


def decode_oracle(inputs: DecodeInputs) -> tuple[Tensor, Tensor, float, float]:
    """What decode_attention should give, (out, lse) in float64, and the errors of 16-bit attention in each."""
    expected, expected_lse = reference.decode_attention(*inputs.positional(), **inputs.options)
    return expected, expected_lse, *sixteen_bit_error(inputs, expected, expected_lse)


def compare_decode(
    out: Tensor, lse: Tensor, inputs: DecodeInputs, solution: tuple[Tensor, Tensor, float, float]
) -> None:
    """Raise AssertionError where a kernel is off from ``decode_oracle(inputs)`` by more than twice what plain attention
    in q's own dtype gets wrong on the same inputs, plus one rounding of the largest value to that dtype.
    """
    expected, expected_lse, error, lse_error = solution
    eps = torch.finfo(inputs.q.dtype).eps
    # fp32 has no 16-bit roundings to hide behind: leave its own exp and sums a few units.
    slack = 8 if inputs.q.dtype == torch.float32 else 1
    assert_close(out, expected, 2 * error + slack * eps * _largest(expected), "out")
    assert_close(lse, expected_lse, 2 * lse_error + slack * eps * max(1.0, _largest(expected_lse)), "lse")


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
