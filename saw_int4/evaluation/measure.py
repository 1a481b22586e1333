"""What a quantized cache does to predictions: per-token loss, divergence and agreement, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean, stdev

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from saw_int4.calibration.attention_hook import AttentionCall, hooked
from saw_int4.evaluation.quantizers import Quantizer

BLOCK = 128  # tokens that are averaged before the spread is taken: neighbours are correlated
ROWS = 256  # logits are compared in pieces of so many rows


@dataclass
class Window:
    """Sums over the blocks of one window, BF16 beside the method; lists are equally long."""

    tokens: list[int]
    nll: list[float]
    reference_nll: list[float]
    kl: list[float]
    agree: list[int]

    def to_json(self) -> dict:
        return asdict(self)


def logits(model, ids: Tensor, quantizer: Quantizer | None) -> Tensor:
    """``[T, vocabulary]`` in the model's dtype, every key and value read back through the quantizer."""
    with torch.inference_mode(), hooked(_through(quantizer)):
        return model(ids[None].to(model.device), use_cache=False).logits[0]


def _through(quantizer: Quantizer | None) -> Callable[[AttentionCall], tuple[Tensor, Tensor]]:
    def replace(call: AttentionCall) -> tuple[Tensor, Tensor]:
        if quantizer is None:
            return call.k, call.v
        local = call.where_operators_run()
        return quantizer(call.layer, local.k, local.v)

    return replace


def compare(reference: Tensor, quantized: Tensor, ids: Tensor) -> Window:
    """One window's sums. reference, quantized: ``[T, vocabulary]``; ids: int64 ``[T]``."""
    targets = ids[1:].to(reference.device)
    columns: list[Tensor] = []
    for start in range(0, len(targets), ROWS):
        rows = slice(start, min(start + ROWS, len(targets)))
        exact = F.log_softmax(reference[:-1][rows].float(), -1)
        found = F.log_softmax(quantized[:-1][rows].float(), -1)
        target = targets[rows, None]
        columns.append(
            torch.stack(
                [
                    -found.gather(1, target)[:, 0],
                    -exact.gather(1, target)[:, 0],
                    (exact.exp() * (exact - found)).sum(-1),
                    (exact.argmax(-1) == found.argmax(-1)).float(),
                ]
            )
        )
    blocks = torch.cat(columns, 1).double().split(BLOCK, 1)
    nll, reference_nll, kl, agree = (list(x) for x in zip(*(block.sum(1).tolist() for block in blocks)))
    return Window([b.shape[1] for b in blocks], nll, reference_nll, kl, [round(a) for a in agree])


def summarize(windows: list[Window]) -> dict:
    """Perplexity, its ratio to BF16, KL and top-1 agreement over windows, 95 % intervals from the blocks' spread."""
    tokens, nll, reference, kl, agree = (
        [x for window in windows for x in getattr(window, name)]
        for name in ("tokens", "nll", "reference_nll", "kl", "agree")
    )
    total = sum(tokens)
    difference, margin = interval([(a - b) / n for a, b, n in zip(nll, reference, tokens)])
    divergence, kl_margin = interval([a / n for a, n in zip(kl, tokens)])
    difference = (sum(nll) - sum(reference)) / total
    return {
        "tokens": total,
        "perplexity": math.exp(sum(nll) / total),
        "reference_perplexity": math.exp(sum(reference) / total),
        "ratio": math.exp(difference),
        "ratio_low": math.exp(difference - margin),
        "ratio_high": math.exp(difference + margin),
        "kl": sum(kl) / total,
        "kl_margin": kl_margin,
        "top1_agreement": sum(agree) / total,
    }


def interval(blocks: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    return mean(blocks), 1.96 * stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.nan


def generate(model, prompt: Tensor, count: int, quantizer: Quantizer | None) -> list[int]:
    """Greedy continuation of int64 ``[T]``, every cached key and value read through the quantizer."""
    with torch.inference_mode(), hooked(_through(quantizer)):
        step = model(prompt[None].to(model.device), use_cache=True)
        tokens = [int(step.logits[0, -1].argmax())]
        while len(tokens) < count:
            last = torch.tensor([[tokens[-1]]], device=model.device)
            step = model(last, past_key_values=step.past_key_values, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
    return tokens


def common_prefix(a: list[int], b: list[int]) -> int:
    """Tokens until two continuations part."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


PLACES = ("harbour", "library", "garden", "station", "museum", "bakery", "castle", "bridge")


def needle(model, tokenizer, haystack: Tensor, depth: float, which: int, quantizer: Quantizer | None) -> dict:
    """Whether a number hidden at ``depth`` (0 to 1) of a haystack int64 ``[T]`` is found again.

    ``which``: the number and what it belongs to differ with it.

    Returns:
        exact: every token of the answer is the most likely one; logprob: of the whole answer, nats.
    """

    def tokens(text: str) -> Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]

    at = round(depth * len(haystack))
    place, number = PLACES[which % len(PLACES)], f" {10007 + 7919 * (which + 1) % 89989}"
    answer = tokens(number)
    hidden = tokens(f"\n\nRemember this: the code of the {place} is{number}.")
    ids = torch.cat([haystack[:at], hidden, haystack[at:], tokens(f"\n\nThe code of the {place} is"), answer])
    predicted = F.log_softmax(logits(model, ids, quantizer)[-len(answer) - 1 : -1].float(), -1)
    answer = answer.to(predicted.device)
    return {
        "exact": bool((predicted.argmax(-1) == answer).all()),
        "logprob": float(predicted.gather(1, answer[:, None]).sum()),
    }
