"""The backend's two paths against float64 attention over the same rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from saw_int4 import env, ops
from saw_int4.sglang_plugin import plan
from saw_int4.sglang_plugin.backend import Int4AttentionBackend
from saw_int4.sglang_plugin.pool import Int4KVPool, name_layers
from saw_int4.sglang_plugin.transform import KeyTransform

pytestmark = pytest.mark.both_versions

H_Q, H_KV, D, PAGE = 6, 2, 64, 16
SLOTS = 1024


def make_backend(monkeypatch, rotation: str, calibrated: bool) -> Int4AttentionBackend:
    """The backend over a fresh pool, without a server around it."""
    monkeypatch.setenv(env.RESOLVED, env.Options(rotation).to_json())
    pool = Int4KVPool(
        SLOTS,
        page_size=PAGE,
        dtype=torch.uint4,
        head_num=H_KV,
        head_dim=D,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    if calibrated:
        scale = torch.rand(H_KV, D) + 0.5
        sign = torch.where(torch.rand(H_KV, D) < 0.5, -1.0, 1.0)
        pool.transforms = [KeyTransform(mean=torch.randn(H_KV, D), scale=scale, inv_scale=1 / scale, sign=sign)]
    backend = object.__new__(Int4AttentionBackend)
    backend.kv_pool, backend.page_size, backend._layers, backend.plan = pool, PAGE, {}, None
    backend.has_swa_pool, backend._workspaces, backend._workspace_rows, backend._graph_rows = False, [], 0, 0
    pages = torch.randperm(SLOTS // PAGE)[:60].view(4, 15)
    table = (pages[:, :, None] * PAGE + torch.arange(PAGE)).view(4, -1).to(torch.int32)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=table)
    return backend


def make_layer(**changes):
    layer = dict(
        layer_id=0,
        tp_q_head_num=H_Q,
        tp_k_head_num=H_KV,
        qk_head_dim=D,
        v_head_dim=D,
        scaling=D**-0.5,
        logit_cap=0.0,
        logit_capping_method="tanh",
        sliding_window_size=-1,
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
        xai_temperature_len=-1,
    )
    return SimpleNamespace(**{**layer, **changes})


def make_batch(backend, prefixes: list[int], news: list[int], decode: bool = False):
    table = backend.req_to_token_pool.req_to_token
    slots = torch.cat([table[i, p : p + n] for i, (p, n) in enumerate(zip(prefixes, news))])
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        req_pool_indices=torch.arange(len(news)),
        seq_lens=torch.tensor(prefixes) + torch.tensor(news),
        extend_seq_lens_cpu=news,
        extend_prefix_lens_cpu=prefixes,
        out_cache_loc=slots.to(torch.int64),
    )


def oracle(backend, batch, q, layer, keys, values, sinks):
    """float64 attention on keys and values as the rows hold them, taken back to the original space."""
    out, row = [], 0
    for i, (prefix, new) in enumerate(zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)):
        k, v = (x[i].repeat_interleave(H_Q // H_KV, 1) for x in (keys, values))
        for t in range(prefix, prefix + new):
            low = max(0, t - layer.sliding_window_size) if layer.sliding_window_size >= 0 else 0
            logits = torch.einsum("hd,nhd->hn", q[row].double(), k[low : t + 1]) * layer.scaling
            if layer.logit_cap > 0:
                logits = layer.logit_cap * torch.tanh(logits / layer.logit_cap)
            if sinks is not None:
                logits = torch.cat([logits, sinks.double()[:, None]], 1)
            weights = logits.softmax(-1)[:, : t + 1 - low]
            out.append(torch.einsum("hn,nhd->hd", weights, v[low : t + 1]))
            row += 1
    return torch.stack(out)


def hadamard(order: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / order**0.5


def stored(backend, lengths: list[int]):
    """Dequantized K and V of each request in the original space, float64."""
    pool = backend.kv_pool
    h, transform = hadamard(D), pool.transforms[0]
    keys, values = [], []
    for i, n in enumerate(lengths):
        k, v = torch.empty(2, n, H_KV, D, dtype=torch.float32)
        ops.gather_kv(*pool.rows(0), backend.req_to_token_pool.req_to_token[i, :n], k, v)
        k, v = k.double(), v.double()
        if transform.sign is not None:
            k = k * transform.sign.double()
        if pool.format.rotation_order > 1:
            k = k @ h
        if transform.mean is not None:
            k = k * transform.scale.double() + transform.mean.double()
        keys.append(k)
        values.append(v @ h if pool.format.rotate_v else v)
    return keys, values


@pytest.mark.parametrize(
    ("rotation", "calibrated", "changes", "with_sinks"),
    [
        ("none", False, {}, False),
        ("k", False, {}, False),
        ("kv", True, {}, False),
        ("k", True, {"sliding_window_size": 20}, False),
        ("k", True, {"logit_cap": 3.0}, True),
        ("kv", True, {"sliding_window_size": 33, "logit_cap": 5.0}, True),
    ],
)
def test_backend_against_float64(monkeypatch, rotation, calibrated, changes, with_sinks):
    """A cold long request, one on a prefix, a short one and a single token, in one batch; then one decode step."""
    torch.manual_seed(1)
    backend = make_backend(monkeypatch, rotation, calibrated)
    layer = make_layer(**changes)
    sinks = torch.randn(H_Q) if with_sinks else None
    prefixes, news = [0, 70, 100, 5], [60, 130, 9, 1]
    for decode in (False, True):
        if decode:
            prefixes, news = [p + n for p, n in zip(prefixes, news)], [1, 1, 1, 1]
        else:  # what earlier passes left in the cache
            first = make_batch(backend, [0, 0, 0, 0], prefixes)
            k, v = torch.randn(2, sum(prefixes), H_KV, D)
            backend.kv_pool._set_quantized_kv_buffer(0, 0, first.out_cache_loc, k, v)
        batch = make_batch(backend, prefixes, news, decode)
        q, k, v = (torch.randn(sum(news), h * D) * 2 for h in (H_Q, H_KV, H_KV))
        backend.init_forward_metadata(batch)
        run = backend.forward_decode if decode else backend.forward_extend
        backend.kv_pool.set_kv_buffer = lambda layer, loc, k, v: backend.kv_pool._set_quantized_kv_buffer(
            0, 0, loc, k, v
        )
        got = run(q, k, v, layer, batch, sinks=sinks).view(-1, H_Q, D)
        want = oracle(
            backend, batch, q.view(-1, H_Q, D), layer, *stored(backend, [p + n for p, n in zip(prefixes, news)]), sinks
        )
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)


def test_path_depends_on_the_request_alone(monkeypatch):
    torch.manual_seed(2)
    backend = make_backend(monkeypatch, "k", False)
    k, v = torch.randn(2, SLOTS, H_KV, D)
    backend.kv_pool._set_quantized_kv_buffer(0, 0, torch.arange(SLOTS), k, v)
    layer, prefixes, news = make_layer(), [0, 70, 100, 5], [60, 130, 9, 1]
    q = torch.randn(sum(news), H_Q * D, dtype=torch.bfloat16)
    backend.init_forward_metadata(batch := make_batch(backend, prefixes, news))
    together = backend.forward_extend(q, None, None, layer, batch)
    start = 0
    for i, (prefix, new) in enumerate(zip(prefixes, news)):
        alone = make_batch(backend, [prefix], [new])
        alone.req_pool_indices = torch.tensor([i])
        backend.init_forward_metadata(alone)
        rows = backend.forward_extend(q[start : start + new], None, None, layer, alone)
        assert torch.equal(rows, together[start : start + new])
        start += new
    assert max(n for n in news if n <= plan.SHORT_EXTEND) == 9  # both paths took part


@pytest.mark.parametrize(
    "changes",
    [
        {"is_cross_attention": True},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"v_head_dim": 32},
        {"tp_k_head_num": 3},
        {"xai_temperature_len": 8},
        {"logit_cap": 1.0, "logit_capping_method": "other"},
    ],
)
def test_layers_it_would_compute_wrongly_are_refused(monkeypatch, changes):
    backend = make_backend(monkeypatch, "k", False)
    batch = make_batch(backend, [0], [4])
    backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match="Way out"):
        backend.forward_extend(torch.zeros(4, H_Q * D), None, None, make_layer(**changes), batch)


def test_unknown_arguments_are_refused(monkeypatch):
    backend = make_backend(monkeypatch, "k", False)
    batch = make_batch(backend, [0], [4])
    backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match="k_rope"):
        backend.forward_extend(torch.zeros(4, H_Q * D), None, None, make_layer(), batch, k_rope=torch.zeros(1))


def test_sliding_window_pool_agrees_with_a_plain_one(monkeypatch):
    """The same requests over one pool, and over SGLang's two-part pool, whose window slots lie elsewhere."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    torch.manual_seed(4)
    prefixes, news = [0, 70, 100, 5], [60, 130, 9, 1]
    layer = make_layer(sliding_window_size=20)
    first, then = (torch.randn(2, n, H_KV * D) for n in (sum(prefixes), sum(news)))
    q = torch.randn(sum(news), H_Q * D)
    results = []
    for two_parts in (False, True):
        torch.manual_seed(8)
        backend = make_backend(monkeypatch, "kv", False)
        if two_parts:
            backend.kv_pool = SWAKVPool(
                size=SLOTS,
                size_swa=SLOTS,
                page_size=PAGE,
                dtype=torch.uint4,
                head_num=H_KV,
                head_dim=D,
                swa_attention_layer_ids=[0],
                full_attention_layer_ids=[1],
                device="cpu",
                token_to_kv_pool_class=Int4KVPool,
            )
            name_layers(backend.kv_pool)
            backend.kv_pool.register_mapping(
                torch.randperm(SLOTS // PAGE).repeat_interleave(PAGE) * PAGE + torch.arange(SLOTS) % PAGE
            )
            backend.has_swa_pool = True
        outputs = []
        rounds = [([0] * 4, prefixes, first, False), (prefixes, news, then, False)]
        rounds.append(([p + n for p, n in zip(prefixes, news)], [1] * 4, then[:, :4] * 2, True))
        for before, new, kv, decode in rounds:
            batch = make_batch(backend, before, new, decode)
            backend.init_forward_metadata(batch)
            run = backend.forward_decode if decode else backend.forward_extend
            k, v = (x.view(-1, H_KV, D) for x in kv)
            outputs.append(run(q[: sum(new)].repeat(2, 1)[: sum(new)], k, v, layer, batch))
        results.append(outputs)
    for plain, parted in zip(*results):
        assert torch.equal(plain, parted)
