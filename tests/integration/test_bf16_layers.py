"""Layers that stay in BF16 beside layers in INT4: in the pool, and through the engine."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from conftest import ARGS, CALIBRATED, POOL_TOKENS
from server import Server
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from saw_int4 import env
from saw_int4.format import row_bytes
from saw_int4.sglang_plugin.pool import Int4KVPool

SIZE, PAGE, HEADS, DIM = 96, 16, 2, 64
SLOTS = torch.arange(SIZE + PAGE)


@pytest.fixture
def mixed(monkeypatch) -> tuple[Int4KVPool, dict]:
    """A pool of the model's layers 4 to 6, of which 5 stays in BF16, and the K and V that each was given."""
    monkeypatch.setenv(env.RESOLVED, env.Options(calibration="none", bf16_layers="0,5").to_json())
    pool = Int4KVPool(
        SIZE,
        page_size=PAGE,
        dtype=torch.uint4,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=3,
        start_layer=4,
        device="cpu",
        enable_memory_saver=False,
        enable_kv_cache_copy=True,
    )
    torch.manual_seed(0)
    given = {layer: torch.randn(2, len(SLOTS), HEADS, DIM, dtype=torch.bfloat16) for layer in (4, 5, 6)}
    for layer, (k, v) in given.items():
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(SLOTS), k, v)
    return pool, given


@pytest.mark.both_versions
def test_pool(mixed):
    """Numbers of the BF16 layer come back as they went in; no stranger reads the others as numbers; sizes are exact."""
    pool, given = mixed
    assert all(torch.equal(got, new) for got, new in zip(pool.get_kv_buffer(5), given[5]))
    assert [pool.get_key_buffer(layer).dtype for layer in (4, 5, 6)] == [torch.uint4, torch.bfloat16, torch.uint4]
    assert pool.bytes_per_token == 2 * HEADS * (2 * row_bytes(DIM) + 2 * DIM)
    assert sum(pool.get_kv_size_bytes()) == len(SLOTS) * pool.bytes_per_token


@pytest.mark.both_versions
def test_rows_of_both_kinds_are_moved(mixed):
    pool, _ = mixed
    buffers = [*pool.k_buffer, *pool.v_buffer]
    source, target = torch.tensor([5, 80, 33]), torch.tensor([61, 2, 90])
    before = [rows.clone() for rows in buffers]
    pool.move_kv_cache(target, source)
    copy = pool.get_cpu_copy(target)
    for old, rows in zip(before, buffers):
        assert torch.equal(rows[target], old[source])
        rows.fill_(0xAB)
    pool.load_cpu_copy(copy, source)
    for old, rows in zip(before, buffers):
        assert torch.equal(rows[source], old[source])
    for pointer, length, item, rows in zip(*pool.get_contiguous_buf_infos(), buffers):
        assert (length, item) == (rows.numel(), PAGE * rows[0].numel())
        assert bytes((ctypes.c_ubyte * item).from_address(pointer)) == rows[:PAGE].numpy().tobytes()


def serve(model, logs, layers: str, capacity: int) -> Server:
    variables = {"SAW_TEST_CACHE_BYTES": str(capacity), "HOME": str(logs), **CALIBRATED}
    log = logs / f"bf16-{layers.replace(':', '')}.log"
    return Server(model, log, *ARGS, "--kv-cache-dtype", "int4", "--saw-bf16-layers", layers, **variables)


def test_all_layers_answer_as_the_bf16_server(model, logs, bf16_server, text_ids):
    """Same capacity from the same bytes, same logits, same answers: bit for bit."""
    server = serve(model, logs, "first:30", POOL_TOKENS * 30 * 3 * 64 * 2 * 2)
    try:
        server.ready()
        assert server.info()["max_total_num_tokens"] == POOL_TOKENS
        prompt = text_ids[:300]
        assert server.prompt_logprobs(prompt) == bf16_server.prompt_logprobs(prompt)
        ours, theirs = (s.generate(prompt, 16, return_logprob=True)["meta_info"] for s in (server, bf16_server))
        assert ours["output_token_logprobs"] == theirs["output_token_logprobs"]
    finally:
        server.stop()


def test_half_of_the_layers_lie_between(model, logs, int4_server, bf16_server, text_ids):
    token_bytes = 15 * 3 * 2 * (36 + 128)
    server = serve(model, logs, "last:15", POOL_TOKENS * token_bytes)
    try:
        server.ready()
        cache = server.state()["kv_cache_format"]
        assert cache["bf16_layers"] == list(range(15, 30))
        assert cache["bytes_per_token"] == token_bytes
        assert server.info()["max_total_num_tokens"] == POOL_TOKENS
        assert f"layers in BF16 {list(range(15, 30))}" in server.text()
        prompt = text_ids[:600]
        half, int4, bf16 = (torch.tensor(s.prompt_logprobs(prompt)) for s in (server, int4_server, bf16_server))
        gaps = [float((x - bf16).abs().mean()) for x in (half, int4)]
        print(f"mean difference from BF16: half {gaps[0]:.4f}, all in INT4 {gaps[1]:.4f}")
        assert 0 < gaps[0] < 0.9 * gaps[1]
    finally:
        server.stop()
