"""Changes to a model in memory that stress a cache format: the same function written otherwise, and key biases."""

from __future__ import annotations

import torch
from torch import nn


def rope_pair(model, factor: float = 16.0, pair: int = 5) -> None:
    """Keys of one RoPE pair times ``factor``, queries divided by it: the same function, exact for powers of two."""
    for attention, head_dim in _attentions(model):
        for weight, by in ((attention.k_proj.weight, factor), (attention.q_proj.weight, 1 / factor)):
            rows = weight.data.view(-1, head_dim, weight.shape[1])
            rows[:, [pair, pair + head_dim // 2]] *= by


def key_bias(model, norm: float = 60.0, pairs: int = 4) -> None:
    """A constant added to the keys of every layer, on the slowest RoPE pairs, as Qwen2 checkpoints have it.

    ``norm`` per head, ten times that in the first and the last layer. Another function than before: compare the result
    with its own BF16.
    """
    layers = list(_attentions(model))
    for i, (attention, head_dim) in enumerate(layers):
        old = attention.k_proj
        generator = torch.Generator().manual_seed(i)
        bias = torch.zeros(old.out_features // head_dim, head_dim)
        slow = [c for p in range(pairs) for c in (head_dim // 2 - 1 - p, head_dim - 1 - p)]
        bias[:, slow] = torch.randn(bias.shape[0], len(slow), generator=generator)
        bias *= norm * (10 if i in (0, len(layers) - 1) else 1) / bias.norm(dim=-1, keepdim=True)
        old.bias = nn.Parameter(bias.flatten().to(old.weight), requires_grad=False)


def _attentions(model):
    for module in model.modules():
        if hasattr(module, "k_proj") and hasattr(module, "layer_idx"):
            if hasattr(module, "k_norm"):
                raise ValueError("this variant is for models without a norm on the keys: it would undo the change.")
            yield module, module.head_dim


VARIANTS = {"rope-pair": rope_pair, "key-bias": key_bias}
