"""Adapters (LoRA) that change queries, keys and values, over an INT4 cache calibrated with the model's own weights."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from checkpoints import qwen3
from conftest import CALIBRATED
from safetensors.torch import save_file
from server import HERE, Server
from test_families import ARGS, PROMPT, gap, load, logprobs, scores

from saw_int4.sglang_plugin.names import sglang_version

CHANGED = ("q_proj", "k_proj", "v_proj")
RANK, ALPHA = 8, 16


def make_adapter(model, folder) -> None:
    """Write a random adapter, as PEFT does, and merge it into the model."""
    torch.manual_seed(0)
    weights = {}
    for i, layer in enumerate(model.model.layers):
        for name in CHANGED:
            weight = getattr(layer.self_attn, name).weight
            a, b = (torch.randn(shape) * 0.1 for shape in ((RANK, weight.shape[1]), (weight.shape[0], RANK)))
            a, b = a.bfloat16(), b.bfloat16()
            stem = f"base_model.model.model.layers.{i}.self_attn.{name}"
            weights |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            weight.data += ALPHA / RANK * b.float() @ a.float()
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": CHANGED, "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM", "bias": "none"}))


@pytest.mark.skipif(sglang_version() == "0.5.21", reason="tried with SGLang 0.5.23 only")
def test_adapter(model, tmp_path, logs):
    """Answers are those of the merged model; tokens cached with the adapter are not taken for the model's own."""
    checkpoint, adapter = qwen3(model, tmp_path / "model"), tmp_path / "adapter"
    base, merged = load(checkpoint), load(checkpoint)
    make_adapter(merged, adapter)
    lora = f"--enable-lora --lora-paths adapter={adapter} --max-lora-rank {RANK} --lora-backend torch_native"
    args = [*ARGS.split(), "64", "--page-size", "16", "--kv-cache-dtype", "int4", *lora.split()]
    options = {"command": [sys.executable, str(HERE / "unpinned_server.py")], **CALIBRATED, "HOME": str(tmp_path)}
    server = Server(checkpoint, logs / "lora.log", *args, "--lora-target-modules", *CHANGED, **options)
    try:
        server.ready()
        for name, expected, other in (("adapter", merged, base), (None, base, merged)):
            got, ids = scores(server, lora_path=name)
            distances = [gap(got, logprobs(m, ids)) for m in (expected, other)]
            print(f"adapter {name}: {distances[0]:.3f} from its model, {distances[1]:.3f} from the other")
            assert distances[0] < distances[1] / 2
        server.flush()
        for name, cached in (("adapter", 0), (None, 0), ("adapter", 192), (None, 192)):  # whole pages of the prompt
            assert server.generate(PROMPT, lora_path=name)["meta_info"]["cached_tokens"] == cached
    finally:
        server.stop()
