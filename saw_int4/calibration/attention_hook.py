"""Sees, and may replace, the queries, keys and values that every attention layer of a transformers model works on.

Keys are post-RoPE here, as a KV cache holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from saw_int4.torchvision_compat import define_missing_operators

NAME = "saw_int4_hook"
_UNSUPPORTED = ("softcap",)
_active: list[Callable[[AttentionCall], tuple[Tensor, Tensor]]] = []


class AttentionCall(NamedTuple):
    """One layer's attention over one sequence.

    Attributes:
        layer: index of the layer in the model.
        q: ``[n, H_q, D]``, the last n of the sequence's T tokens.
        k, v: ``[T, H_kv, D]``, post-RoPE.
        sm_scale: multiplies q.k.
        window: a row sees its own and the ``window - 1`` tokens before it; None: all.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    sm_scale: float
    window: int | None

    def where_operators_run(self) -> AttentionCall:
        """Itself, or a copy on CPU where the extension has no kernels for its device."""
        if self.k.is_cuda and not torch._C._dispatch_has_kernel_for_dispatch_key("saw_int4::append_kv", "CUDA"):
            return self._replace(q=self.q.cpu(), k=self.k.cpu(), v=self.v.cpu())
        return self

    def visible(self) -> Tensor:
        """Which tokens each row sees: bool ``[n, T]``."""
        tokens, rows = self.k.shape[0], self.q.shape[0]
        position = torch.arange(tokens - rows, tokens, device=self.q.device)[:, None]
        token = torch.arange(tokens, device=self.q.device)[None]
        seen = token <= position
        return seen if self.window is None else seen & (token > position - self.window)


def load_model(path: str, device: str = "cpu"):
    """A checkpoint's causal language model in its own dtype, attention going through this hook, and its tokenizer.

    Raises:
        ValueError: transformers cannot load the checkpoint.
    """
    define_missing_operators()
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    AttentionInterface.register(NAME, _attention)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation=NAME)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {path}: transformers cannot load it ({error}). Give the folder of a checkpoint."
        ) from error
    return model.to(device).eval(), tokenizer


@contextmanager
def hooked(replace: Callable[[AttentionCall], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While active, ``replace(call)`` gives the keys and values that each layer attends to (its own: unchanged)."""
    _active.append(replace)
    try:
        yield
    finally:
        _active.remove(replace)


def _attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, s_aux=None, **kwargs
):
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported or query.shape[0] != 1:
        what = f"option {', '.join(unsupported)}" if unsupported else f"batch size {query.shape[0]}"
        raise NotImplementedError(
            f"attention layer {module.layer_idx}: {what} is not known to this hook, which takes one sequence at a "
            "time and plain, sliding-window or grouped softmax attention, with or without sinks."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(module.layer_idx, *(x[0].transpose(0, 1) for x in (query, key, value)), scale, sliding_window)
    for replace in _active:
        k, v = replace(call)
        key, value = (x.to(query).transpose(0, 1)[None] for x in (k, v))
    causal = query.shape[2] == key.shape[2] and (sliding_window is None or key.shape[2] <= sliding_window)
    seen = None if causal and s_aux is None else call.visible()
    if s_aux is not None:
        query, key, value, seen = _with_sinks(query, key, value, seen, s_aux / scale)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        is_causal=seen is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _with_sinks(query, key, value, seen, sinks):
    """The same attention with one token more, which every row sees: its value is zero, its score the head's sink.

    A channel more carries it: 1 in queries, 0 in all other keys.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))  # sinks are per query head
    key, value = (torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2) for x in (key, value))
    extra = torch.zeros_like(key[..., :1])
    extra[0, :, 0, 0] = sinks
    query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
    return query, torch.cat([key, extra], dim=-1), value, torch.cat([torch.ones_like(seen[:, :1]), seen], dim=1)
