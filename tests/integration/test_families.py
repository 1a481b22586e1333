"""Tiny random models of several families, served with INT4 and compared with transformers in float32.

They are started by ``python -m sglang.launch_server``.

Each is also compared with transformers without the trait that the family is here for: the served answers must lie far
closer to the model than to its crippled twin.
"""

from __future__ import annotations

import statistics
import sys

import pytest
import torch
from checkpoints import gemma2, gemma3, granite_swa, qwen2, save
from conftest import CALIBRATED
from server import Server

ARGS = "--max-total-tokens 2048 --context-length 512 --max-running-requests 4 --chunked-prefill-size"
PROMPT = [(37 * i * i + 11 * i) % 4000 + 200 for i in range(200)]


def no_sinks(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)


def no_window(model) -> None:
    model.config.layer_types = ["full_attention"] * model.config.num_hidden_layers
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
        layer.self_attn.layer_type = "full_attention"


def no_key_bias(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.zero_()


def no_cap(model) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def load(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")


def logprobs(model, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logs[range(len(ids) - 1), ids[1:]].tolist()


def gap(a: list[float], b: list[float]) -> float:
    return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("make", "cripple", "pools", "page", "chunk"),
    [
        (granite_swa, [no_sinks, no_window], 2, 16, 64),
        (gemma3, [no_window], 1, 32, 64),
        (gemma2, [no_cap, no_window], 1, 16, 64),
        (qwen2, [no_key_bias], 1, 128, 128),
    ],
)
def test_family(model, tmp_path, logs, make, cripple, pools, page, chunk):
    checkpoint = make(model, tmp_path / "model")
    args = [*ARGS.split(), str(chunk), "--page-size", str(page), "--kv-cache-dtype", "int4"]
    command = [sys.executable, "-m", "sglang.launch_server"]
    server = Server(checkpoint, logs / f"{make.__name__}.log", *args, command=command, **CALIBRATED, HOME=str(tmp_path))
    try:
        server.ready()
        got, ids = scores(server)
        cache = server.state()["kv_cache_format"]
        if make is qwen2:
            other_weights(server, model, checkpoint, tmp_path / "other")
    finally:
        server.stop()
    assert cache["allocated_bytes"] > 0
    assert ("calibration none" in cache["format"]) == (make is gemma2)  # calibration does not know capped logits
    assert (server.text().count("SWAKVPool mem usage") > 0) == (pools == 2)
    distance = gap(got, logprobs(load(checkpoint), ids))
    for change in cripple:
        twin = load(checkpoint)
        change(twin)
        control = gap(got, logprobs(twin, ids))
        print(f"{make.__name__}: {distance:.3f} from the model, {control:.3f} {change.__name__}")
        assert distance < control / 2, (change.__name__, distance, control)


def scores(server) -> tuple[list[float], list[int]]:
    """A prompt and its answer: log probabilities, from the second token on, and the tokens."""
    meta = server.generate(PROMPT, 24, return_logprob=True, logprob_start_len=0)["meta_info"]
    entries = meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]
    return [entry[0] for entry in entries], PROMPT + [entry[1] for entry in meta["output_token_logprobs"]]


def other_weights(server, model, checkpoint, folder) -> None:
    """Given to the running server: the transform was fitted to the old ones, and stays exact."""
    twin = load(checkpoint)
    no_key_bias(twin)
    save(twin, model, folder)
    assert server.call("/update_weights_from_disk", {"model_path": str(folder)})["success"]
    got, ids = scores(server)
    distances = [gap(got, logprobs(load(path), ids)) for path in (folder, checkpoint)]
    print(f"other weights: {distances[0]:.3f} from them, {distances[1]:.3f} from the old ones")
    assert distances[0] < distances[1] / 2
