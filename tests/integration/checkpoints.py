"""Tiny random checkpoints of model families, with SmolLM2's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch


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
    shape = dict(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return save(Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes})), tokenizer_from, folder)
