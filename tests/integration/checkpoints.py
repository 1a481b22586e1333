"""Tiny random checkpoints of model families, with SmolLM2's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

_SMALL = dict(
    vocab_size=49152,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    initializer_range=0.05,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def save(model, tokenizer_from: Path, folder: Path) -> Path:
    """Write a checkpoint that SGLang can serve; returns ``folder``."""
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer_from.glob("*token*"):
        shutil.copy(file, folder)
    for extra in ("chat_template.jinja", "vocab.json", "merges.txt"):
        if (tokenizer_from / extra).exists():
            shutil.copy(tokenizer_from / extra, folder)
    return folder


def qwen3(tokenizer_from: Path, folder: Path, **changes) -> Path:
    """Dense Qwen3, head_dim 128, 4 query heads on 2 KV heads, 3 layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {**_SMALL, "num_hidden_layers": 3, "head_dim": 128}
    return save(Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes})), tokenizer_from, folder)


def qwen2(tokenizer_from: Path, folder: Path) -> Path:
    """Qwen2: 4 query heads on 2 KV heads, head_dim 64. Queries have their key's bias: together they attend nearby."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    shape = {**_SMALL, "hidden_size": 256, "num_hidden_layers": 3}
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.normal_(0, 0.5)
        layer.self_attn.q_proj.bias.data = bias.view(2, 64).repeat_interleave(2, 0).flatten()
    return save(model, tokenizer_from, folder)


def gemma3(tokenizer_from: Path, folder: Path) -> Path:
    """Gemma 3: head_dim 256, one KV head, layers with a window of 32 tokens between full ones."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(2)
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    shape = {**_SMALL, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 3, "query_pre_attn_scalar": 256}
    config = Gemma3TextConfig(**shape, layer_types=layers, sliding_window=32)
    return save(Gemma3ForCausalLM(config), tokenizer_from, folder)


def granite_swa(tokenizer_from: Path, folder: Path) -> Path:
    """Granite with attention sinks and a sliding-window pool of its own: window 32, head_dim 64."""
    from transformers import GraniteSWAConfig, GraniteSWAForCausalLM

    torch.manual_seed(3)
    layers = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    shape = {**_SMALL, "hidden_size": 256, "num_hidden_layers": 4, "attention_multiplier": 64**-0.5}
    config = GraniteSWAConfig(**shape, layer_types=layers, sliding_window=32, layer_rope_theta=[10000.0] * 4)
    model = GraniteSWAForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(2, 2)
    return save(model, tokenizer_from, folder)
