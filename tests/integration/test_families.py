"""Tiny random models of several families, served with INT4: compared with transformers and with SGLang's BF16 cache.

They are started by ``python -m sglang.launch_server``.

What INT4 may differ from BF16 is computed, not chosen: what the same rows do to the model in transformers in float32,
by the reference's arithmetic, and what BF16 itself loses there.

Each is also compared with transformers without the trait that the family is here for: the served answers must lie far
closer to the model than to its crippled twin. Families without such a trait show that the bound can be broken: rows of
the token before break it.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from contextlib import contextmanager

import pytest
import torch
from checkpoints import gemma2, gemma3, gpt_oss, granite_swa, llama, qwen2, qwen3, qwen3_moe, save
from conftest import CALIBRATED
from server import Server

from saw_int4 import env, reference
from saw_int4.calibration.calibrate import path_of
from saw_int4.calibration.fingerprint import model_fingerprint

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


@contextmanager
def quantized(model, options: env.Options, slots_off: int = 0):
    """While active, the model attends to keys and values as rows of INT4 hold them, by the reference's arithmetic.

    ``slots_off``: to those of the token that lies so many slots before.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_format, calibration = options.kv_format(head_dim), options.load_calibration()
    order = kv_format.rotation_order

    def through_rows(x):
        return reference.dequantize_rows(reference.quantize_rows(x.roll(slots_off, 0), kv_format.groups))

    def attention(module, query, key, value, *args, **kwargs):
        k, v = (x[0].transpose(0, 1) for x in (key, value))
        if calibration is None:
            k = reference.hadamard(through_rows(reference.hadamard(k, order)), order)
        else:
            t = calibration.rank(module.layer_idx, 0, 1)
            k = through_rows(reference.transform_keys(k, order, t.mean, 1 / t.scale, t.sign))
            k = reference.hadamard(k * t.sign, order) * t.scale + t.mean
        rotation = order if kv_format.rotate_v else 1
        v = reference.hadamard(through_rows(reference.hadamard(v, rotation)), rotation)
        return eager(module, query, *(x.transpose(0, 1)[None] for x in (k, v)), *args, **kwargs)

    source = sys.modules[type(model).__module__]
    eager, source.eager_attention_forward = source.eager_attention_forward, attention
    try:
        yield
    finally:
        source.eager_attention_forward = eager


def as_far_as_expected(int4: list[float], bf16: list[float], exact: list[float], rows: list[float]) -> str:
    """Assert that INT4 is no farther from BF16 than the rows' own error and BF16's make it.

    Roundings fall otherwise in the server than in the simulation, so that two means of as many tokens are compared:
    4 standard errors are allowed.
    """
    int4, bf16, exact, rows = (torch.tensor(x, dtype=torch.float64) for x in (int4, bf16, exact, rows))
    found, expected, own = (int4 - bf16).abs(), (rows - exact).abs(), (bf16 - exact).abs()
    error = math.sqrt((found.var() + expected.var()) / len(found))
    text = f"{found.mean():.4f} from BF16; rows {expected.mean():.4f}, BF16 {own.mean():.4f}, s.e. {error:.4f}"
    assert found.mean() < expected.mean() + own.mean() + 4 * error, text
    return text


# What SGLang cannot serve in BF16 on a CPU: transformers in BF16 takes its place. Tried: its torch_native attention
# ends with a TypeError where sinks come, and leaves caps out (0.45 from this Gemma 2, 0.02 from it without a cap);
# gpt-oss is refused with it.
ONLY_WITH_INT4 = (granite_swa, gpt_oss, gemma2)


@pytest.mark.parametrize(
    ("make", "cripple", "pools", "page", "chunk"),
    [
        (granite_swa, [no_sinks, no_window], 2, 16, 64),
        (gpt_oss, [no_sinks, no_window], 2, 16, 64),
        (gemma3, [no_window], 1, 32, 64),
        (gemma2, [no_cap, no_window], 1, 16, 64),
        (qwen2, [no_key_bias], 1, 128, 128),
        (llama, [], 1, 16, 64),
        (qwen3, [], 1, 1, 64),
        (qwen3_moe, [], 1, 64, 64),
    ],
)
def test_family(model, tmp_path, logs, make, cripple, pools, page, chunk):
    checkpoint = make(model, tmp_path / "model")
    args = [*ARGS.split(), str(chunk), "--page-size", str(page)]
    options = {"command": [sys.executable, "-m", "sglang.launch_server"], **CALIBRATED, "HOME": str(tmp_path)}
    server = Server(checkpoint, logs / f"{make.__name__}.log", *args, "--kv-cache-dtype", "int4", **options)
    sglangs = None
    try:
        if make not in ONLY_WITH_INT4:
            sglangs = Server(checkpoint, logs / f"{make.__name__}-bf16.log", *args, **options)
        server.ready()
        got, ids = scores(server)
        cache = server.state()["kv_cache_format"]
        if make is qwen2:
            other_weights(server, model, checkpoint, tmp_path / "other")
        bf16 = sglangs.ready().prompt_logprobs(ids) if sglangs else logprobs(load(checkpoint).bfloat16(), ids)
    finally:
        for started in filter(None, (server, sglangs)):
            started.stop()
    assert cache["allocated_bytes"] > 0
    assert ("calibration none" in cache["format"]) == (make is gemma2)  # calibration does not know capped logits
    assert (server.text().count("SWAKVPool mem usage") > 0) == (pools == 2)

    exact = logprobs(load(checkpoint), ids)
    as_served = env.Options(calibration="none" if make is gemma2 else artifact(checkpoint, tmp_path, cache))
    twin = load(checkpoint)
    with quantized(twin, as_served):
        rows = logprobs(twin, ids)
    for name, part in (("prompt", slice(len(PROMPT) - 1)), ("answer", slice(len(PROMPT) - 1, None))):
        distances = as_far_as_expected(got[part], bf16[part], exact[part], rows[part])
        print(f"{make.__name__}, {name}: {distances}")

    if not cripple:
        prompt = slice(len(PROMPT) - 1)
        with quantized(twin, as_served, slots_off=1):
            astray = logprobs(twin, ids)
        with pytest.raises(AssertionError, match="from BF16; rows"):
            print(as_far_as_expected(astray[prompt], *(x[prompt] for x in (bf16, exact, rows))))
    distance = gap(got, exact)
    for change in cripple:
        twin = load(checkpoint)
        change(twin)
        control = gap(got, logprobs(twin, ids))
        print(f"{make.__name__}: {distance:.3f} from the model, {control:.3f} {change.__name__}")
        assert distance < control / 2, (change.__name__, distance, control)


def artifact(checkpoint, home, cache: dict) -> str:
    """The calibration that a server made for itself."""
    order = int(re.search(r"order (\d+)", cache["format"])[1])
    return str(path_of(model_fingerprint(checkpoint), order, 1, home=home))


def scores(server, **more) -> tuple[list[float], list[int]]:
    """A prompt and its answer: log probabilities, from the second token on, and the tokens."""
    meta = server.generate(PROMPT, 48, return_logprob=True, logprob_start_len=0, **more)["meta_info"]
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
