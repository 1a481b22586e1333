"""Changes to a Llama that stress a cache format: the same function written otherwise, and key biases."""

from __future__ import annotations

from pathlib import Path

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


def multi_head(model) -> None:
    """A KV head for each query head, a copy of the one it shared: the same function, without grouped queries."""
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    for attention, head_dim in _attentions(model):
        for old in (attention.k_proj, attention.v_proj):
            by_head = old.weight.data.view(-1, head_dim, old.in_features)
            old.weight = nn.Parameter(by_head.repeat_interleave(group, 0).flatten(0, 1), requires_grad=False)
            old.out_features *= group
        attention.num_key_value_groups = 1
    config.num_key_value_heads = config.num_attention_heads


VARIANTS = {"rope-pair": rope_pair, "multi-head": multi_head, "key-bias": key_bias}


def changed(model, names: str):
    """The model after VARIANTS, one or several joined with ``+``, in that order.

    Raises:
        ValueError: a name is not known, or does not suit the model.
    """
    for name in names.split("+"):
        if name not in VARIANTS:
            raise ValueError(f"variant {name!r} is unknown; expected some of {list(VARIANTS)}, joined with +.")
        VARIANTS[name](model)
    return model


def save(model, tokenizer, folder: Path) -> None:
    """Write a changed Llama as a checkpoint that engines know: with key biases it is a Qwen2.

    transformers then splits text as Qwen2 does, whatever the tokenizer says: compare with the BF16 of the same folder.
    """
    biased = [attention for attention, _ in _attentions(model) if attention.k_proj.bias is not None]
    (_as_qwen2(model) if biased else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _as_qwen2(model):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps rope_parameters tie_word_embeddings bos_token_id "
        "eos_token_id pad_token_id head_dim"
    )
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(model.config, name) for name in fields.split()}))
    for attention, _ in _attentions(qwen2):  # Qwen2 has a bias on queries and values too
        for projection in (attention.q_proj, attention.v_proj):
            projection.bias.data.zero_()
    weights = model.state_dict()
    kept = qwen2.state_dict()
    qwen2.load_state_dict({name: weights.get(name, kept[name]) for name in kept})
    return qwen2.to(model.dtype)


def _attentions(model):
    for module in model.modules():
        if hasattr(module, "k_proj") and hasattr(module, "layer_idx"):
            if hasattr(module, "k_norm"):
                raise ValueError("this variant is for models without a norm on the keys: it would undo the change.")
            yield module, module.head_dim
