"""Shows each attention layer of a transformers model the calibration text, once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saw_int4.calibration.attention_hook import AttentionCall, hooked
from saw_int4.calibration.statistics import LayerStatistics

MIN_TOKENS = 512
FIRST_TOKENS = 16


def first_tokens(tokenizer, ids: Tensor) -> list[int]:
    """Tokens that prompts begin with: the model's BOS where it sets one, else a chat's opening and some others."""
    if tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id:
        return [tokenizer.bos_token_id]
    spread = ids[:: max(1, len(ids) // FIRST_TOKENS)].tolist()
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        spread.append(tokenizer(chat, add_special_tokens=False).input_ids[0])
    return spread


def collect(
    model,
    ids: Tensor,
    opening: list[int],
    consume: Callable[[AttentionCall, LayerStatistics], None],
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Run the model over the text, and call ``consume(call, statistics)`` for each attention layer as it passes.

    Args:
        model: as ``attention_hook.load_model`` gives it.
        ids: int64 ``[T]``.
        opening: tokens that prompts begin with; the mean of their keys at position 0 is ``first_key``.
        progress: called with the layers done.

    Raises:
        ValueError: the text is too short, or no attention layer was seen.
    """
    if len(ids) < MIN_TOKENS:
        raise ValueError(
            f"calibration text: {len(ids)} tokens, expected at least {MIN_TOKENS}. "
            "Give a longer text, or none for the built-in one."
        )
    first: dict[int, Tensor] = {}
    seen: set[int] = set()

    def add_first(call: AttentionCall) -> tuple[Tensor, Tensor]:
        key = call.where_operators_run().k[0].float()
        first[call.layer] = first.get(call.layer, 0.0) + key / len(opening)
        return call.k, call.v

    def observe(call: AttentionCall) -> tuple[Tensor, Tensor]:
        local = call.where_operators_run()
        consume(local, LayerStatistics.of(local, first[call.layer]))
        seen.add(call.layer)
        progress(len(seen))
        return call.k, call.v

    with torch.inference_mode():
        for token in opening:
            with hooked(add_first):
                model.model(torch.tensor([[token]], device=model.device), use_cache=False)
        with hooked(observe):
            model.model(ids[None].to(model.device), use_cache=False)
    if not seen:
        raise ValueError("calibration: the model called no attention layer that transformers lets us see.")
