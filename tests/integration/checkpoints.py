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


def llama(tokenizer_from: Path, folder: Path) -> Path:
    """Llama: multi-query attention, 4 query heads on one KV head of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = {**_SMALL, "num_hidden_layers": 3, "hidden_size": 256, "num_key_value_heads": 1}
    return save(LlamaForCausalLM(LlamaConfig(**shape)), tokenizer_from, folder)


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


def qwen3_moe(tokenizer_from: Path, folder: Path) -> Path:
    """Qwen3 with experts: 2 of 4 for each token. Multi-head attention: 4 query heads, 4 KV heads, head_dim 128."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(4)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    shape = {**_SMALL, "num_hidden_layers": 3, "head_dim": 128, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)), tokenizer_from, folder)


def gemma2(tokenizer_from: Path, folder: Path) -> Path:
    """Gemma 2: logits of attention capped, at a value that they reach; one KV head of 64, every other with a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(5)
    shape = {**_SMALL, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 4, "query_pre_attn_scalar": 1}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None}  # SGLang caps the last ones in Triton
    config = Gemma2Config(**shape, **caps, sliding_window=32, hidden_act="gelu_pytorch_tanh")
    return save(Gemma2ForCausalLM(config), tokenizer_from, folder)


def gpt_oss(tokenizer_from: Path, folder: Path) -> Path:
    """gpt-oss in 16 bits: attention sinks, experts, every other layer with a window of 32, in a pool of its own."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(8)
    shape = {**_SMALL, "hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64, "tie_word_embeddings": False}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    layers = ["sliding_attention", "full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(**shape, **experts, layer_types=layers, sliding_window=32, rope_parameters=rope)
    model = GptOssForCausalLM(config)
    for name, weight in model.named_parameters():
        if "bias" in name:
            weight.data.normal_(0, 0.02)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(2, 2)
    return save(model, tokenizer_from, folder)


def eagle_head(tokenizer_from: Path, folder: Path) -> Path:
    """An EAGLE draft for ``qwen3``, head_dim 32: it says again what the target said last, right where that repeats.

    Its layer attends, but adds nothing to the target's hidden state.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    config = LlamaConfig(**{**_SMALL, "num_hidden_layers": 1, "tie_word_embeddings": False})
    config.architectures, config.dtype = ["LlamaForCausalLMEagle"], torch.bfloat16
    weights = {n.removeprefix("model."): w for n, w in LlamaForCausalLM(config).state_dict().items() if "layers" in n}
    del weights["layers.0.input_layernorm.weight"]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.0.{name}.weight"].zero_()
    size = config.hidden_size
    weights["fc.weight"] = torch.cat([torch.zeros(size, size), torch.eye(size)], 1)
    weights["fc.bias"] = torch.zeros(size)
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({name: w.bfloat16().contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    return folder
