"""The backend's two paths against float64 attention over the same rows."""

from __future__ import annotations

import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from saw_int4 import env, ops
from saw_int4.sglang_plugin import bf16_layers, prefill, verify, workspaces
from saw_int4.sglang_plugin.backend import Int4AttentionBackend
from saw_int4.sglang_plugin.plan import Span, arrange
from saw_int4.sglang_plugin.pool import Int4KVPool, name_layers
from saw_int4.sglang_plugin.transform import KeyTransform
from saw_int4.sglang_plugin.window_slots import WindowSlots

pytestmark = pytest.mark.both_versions

H_Q, H_KV, D, PAGE = 6, 2, 64, 16
SLOTS = 1024


def make_backend(
    monkeypatch, rotation: str, calibrated: bool, device: str = "cpu", groups: int = 1, layers=None, in_bf16=""
) -> Int4AttentionBackend:
    """The backend over a fresh pool, without a server around it."""
    monkeypatch.setenv(env.RESOLVED, env.Options(rotation, groups=groups, bf16_layers=in_bf16).to_json())
    monkeypatch.setattr(verify, "pool", lambda model_runner: None)
    pool = Int4KVPool(
        SLOTS,
        page_size=PAGE,
        dtype=torch.uint4,
        head_num=H_KV,
        head_dim=D,
        layer_num=1,
        device=device,
        enable_memory_saver=False,
    )
    if calibrated:
        scale = torch.rand(H_KV, D, device=device) + 0.5
        sign = torch.where(torch.rand(H_KV, D, device=device) < 0.5, -1.0, 1.0)
        mean = torch.randn(H_KV, D, device=device)
        pool.transforms = [KeyTransform(mean=mean, scale=scale, inv_scale=1 / scale, sign=sign)]
    pages = torch.randperm(SLOTS // PAGE)[:60].view(4, 15)
    table = (pages[:, :, None] * PAGE + torch.arange(PAGE)).view(4, -1).to(torch.int32).to(device)
    runner = SimpleNamespace(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        page_size=PAGE,
        model=torch.nn.ModuleList(layers or [RadixAttention(H_Q, D, D**-0.5, H_KV, layer_id=0)]),
        model_config=SimpleNamespace(num_attention_heads=H_Q, get_total_num_kv_heads=lambda: H_KV),
        dtype=torch.float32,
        sliding_window_size=None,
        device=device,
    )
    backend = Int4AttentionBackend(runner)
    pool.set_kv_buffer = lambda layer, loc, k, v: pool._set_quantized_kv_buffer(0, 0, loc, k, v)
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
        use_irope=False,
    )
    return SimpleNamespace(**{**layer, **changes})


def make_batch(backend, prefixes: list[int], news: list[int], decode: bool = False):
    table = backend.req_to_token_pool.req_to_token
    device = table.device
    slots = torch.cat([table[i, p : p + n] for i, (p, n) in enumerate(zip(prefixes, news))])
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        req_pool_indices=torch.arange(len(news), device=device),
        seq_lens=torch.tensor(prefixes, device=device) + torch.tensor(news, device=device),
        extend_seq_lens_cpu=news,
        extend_prefix_lens_cpu=prefixes,
        out_cache_loc=slots.to(torch.int64),
    )


def oracle(batch, q, layer, keys, values, sinks, own=None):
    """float64 attention on keys and values as the rows hold them, taken back to the original space.

    own: K and V of the new tokens, and for each request how many of its last tokens see each other as those are.
    """
    out, row = [], 0
    for i, (prefix, new) in enumerate(zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)):
        start = row - prefix  # of the request's first token, counted as new ones are
        for t in range(prefix, prefix + new):
            low = max(0, t - layer.sliding_window_size) if layer.sliding_window_size >= 0 else 0
            k, v = keys[i][low : t + 1].clone(), values[i][low : t + 1].clone()
            if own is not None and own[2][i]:
                first = max(low, prefix + (t - prefix) // own[2][i] * own[2][i])
                k[first - low :], v[first - low :] = (x[start + first : start + t + 1] for x in own[:2])
            k, v = (x.repeat_interleave(H_Q // H_KV, 1) for x in (k, v))
            logits = torch.einsum("hd,nhd->hn", q[row].double(), k) * layer.scaling
            if layer.logit_cap > 0:
                logits = layer.logit_cap * torch.tanh(logits / layer.logit_cap)
            if sinks is not None:
                logits = torch.cat([logits, sinks.double()[:, None]], 1)
            weights = logits.softmax(-1)[:, : t + 1 - low]
            out.append(torch.einsum("hn,nhd->hd", weights, v))
            row += 1
    return torch.stack(out)


def hadamard(order: int, device) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / order**0.5


def stored(backend, lengths: list[int]):
    """Dequantized K and V of each request in the original space, float64."""
    pool = backend.token_to_kv_pool
    h, transform = hadamard(D, pool.device), pool.transforms[0]
    keys, values = [], []
    for i, n in enumerate(lengths):
        k, v = torch.empty(2, n, H_KV, D, dtype=torch.float32, device=pool.device)
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


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
FORMATS = [  # rotation, calibrated, groups, changes of the layer, with sinks
    ("none", False, 1, {}, False),
    ("k", False, 1, {}, False),
    ("kv", True, 1, {}, False),
    ("kv", True, 2, {}, False),
    ("kv", True, 1, {}, True),
    ("k", True, 1, {"sliding_window_size": 20}, False),
    ("k", True, 1, {"logit_cap": 3.0}, True),
    ("kv", True, 1, {"sliding_window_size": 33, "logit_cap": 5.0}, True),
]


@pytest.mark.parametrize("device", [*DEVICES, pytest.param("cuda-by-pytorch", marks=DEVICES[1].marks)])
@pytest.mark.parametrize("capacity", [10**6, 90], ids=["whole", "pieces"])
@pytest.mark.parametrize("fresh", [False, True], ids=["read-back", "fresh"])
@pytest.mark.parametrize(("rotation", "calibrated", "groups", "changes", "with_sinks"), FORMATS)
def test_backend_against_float64(
    monkeypatch, rotation, calibrated, groups, changes, with_sinks, fresh, capacity, device
):
    """Cold long and short requests, one on a prefix, a short one and a single token in one batch; then a decode step.

    With room for 90 keys the second request, of 200, is cut in rows and in keys. On a GPU with what ``choose`` takes
    for long extends, which is FlashInfer's kernels where they are installed, and with PyTorch's.
    """
    torch.manual_seed(1)
    device, _, by_pytorch = device.partition("-by-")
    backend = make_backend(monkeypatch, rotation, calibrated, device, groups)
    backend.fresh, backend.capacity = fresh, capacity
    if by_pytorch:
        backend._attend = prefill.attend
    dtype, tolerance = (torch.float32, 2e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    layer = make_layer(**changes)
    sinks = torch.randn(H_Q, device=device) if with_sinks else None
    prefixes, news = [0, 70, 100, 5], [60, 130, 9, 1]
    for decode in (False, True):
        if decode:
            prefixes, news = [p + n for p, n in zip(prefixes, news)], [1, 1, 1, 1]
        else:  # what earlier passes left in the cache
            first = make_batch(backend, [0, 0, 0, 0], prefixes)
            k, v = torch.randn(2, sum(prefixes), H_KV, D, device=device).to(dtype)
            backend.token_to_kv_pool._set_quantized_kv_buffer(0, 0, first.out_cache_loc, k, v)
        batch = make_batch(backend, prefixes, news, decode)
        q, k, v = ((torch.randn(sum(news), h * D, device=device) * 2).to(dtype) for h in (H_Q, H_KV, H_KV))
        backend.init_forward_metadata(batch)
        run = backend.forward_decode if decode else backend.forward_extend
        got = run(q, k, v, layer, batch, sinks=sinks).view(-1, H_Q, D)
        keys, values = stored(backend, [p + n for p, n in zip(prefixes, news)])
        own = None
        if fresh and not decode:
            own = [x.view(-1, H_KV, D).double() for x in (k, v)]
            own.append([60, 130 if capacity > 200 else capacity // 2, 0, 0])
        want = oracle(batch, q.view(-1, H_Q, D), layer, keys, values, sinks, own)
        assert ((got - want).norm() / want.norm()).item() < tolerance


@pytest.mark.parametrize("seed", range(40))
def test_every_row_sees_its_keys_once(seed):
    """Random requests, windows and workspaces: calls fit, rows are covered once, and their keys are those in sight."""
    rng = random.Random(seed)
    capacity, fresh = rng.choice([64, 100, 1000]), rng.random() < 0.5
    window = rng.choice([-1, -1, 0, 7, capacity // 2])
    requests, start = [], 0
    for place in range(rng.randint(1, 5)):
        prefix, new = rng.choice([0, rng.randint(1, 300)]), rng.randint(1, 300)
        requests.append(Span(start, start + new, 0, prefix + new, place))
        start += new + rng.choice([0, 3])
    seen = {}
    for spans, pieces in arrange(requests, window, capacity, fresh):
        for span in spans:
            request = requests[span.place]
            shift = request.high - request.num_rows - request.start  # from a row to its position
            calls = [keys for piece in pieces for keys in piece if keys.place == span.place and keys.end == span.end]
            for row in range(span.start, span.end):
                assert row not in seen
                position = row + shift
                if not pieces:
                    assert fresh and request.high == request.num_rows
                    seen[row] = True
                    continue
                keys = [t for c in calls for t in range(c.low, c.high) if t <= position]
                if window >= 0:
                    keys = [t for t in keys if t >= position - window]
                    assert len(calls) == 1  # no call but the last may mask keys
                assert sorted(keys) == list(range(max(0, position - window) if window >= 0 else 0, position + 1))
                seen[row] = True
        for piece in pieces:
            assert sum(keys.num_keys for keys in piece) <= capacity
    assert len(seen) == sum(r.num_rows for r in requests)


def test_path_depends_on_the_request_alone(monkeypatch):
    torch.manual_seed(2)
    backend = make_backend(monkeypatch, "k", False)
    k, v = torch.randn(2, SLOTS, H_KV, D)
    backend.token_to_kv_pool._set_quantized_kv_buffer(0, 0, torch.arange(SLOTS), k, v)
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
    assert max(n for n in news if n <= backend.decode_limit) == 9  # both paths took part


@pytest.mark.parametrize(
    "changes",
    [
        {"is_cross_attention": True},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"v_head_dim": 32},
        {"tp_k_head_num": 3},
        {"xai_temperature_len": 8},
        {"use_irope": True},
        {"logit_cap": 1.0, "logit_capping_method": "other"},
    ],
)
def test_layers_it_would_compute_wrongly_are_refused(monkeypatch, changes):
    backend = make_backend(monkeypatch, "k", False)
    batch = make_batch(backend, [0], [4])
    backend.init_forward_metadata(batch)
    backend._layers.clear()
    with pytest.raises(NotImplementedError, match="Way out"):  # a layer that the model did not show
        backend.forward_extend(torch.zeros(4, H_Q * D), None, None, make_layer(**changes), batch)
    module = RadixAttention(H_Q, D, D**-0.5, H_KV, layer_id=0)
    vars(module).update(changes)
    with pytest.raises(NotImplementedError, match="Way out"):  # of the model, before anything is served
        make_backend(monkeypatch, "k", False, layers=[module])


def test_layers_outside_of_the_modules_are_found():
    """SGLang's models of Transformers' implementation hold theirs in a dict, where ``modules()`` does not look."""
    model = torch.nn.Module()
    with pytest.raises(NotImplementedError, match="no attention layers found in Module, expected .* Way out"):
        workspaces.attention_layers(model)
    model.attention_instances = {
        i: RadixAttention(H_Q, D, D**-0.5, H_KV, layer_id=i, sliding_window_size=window)
        for i, window in enumerate((-1, WINDOW))
    }
    assert workspaces.attention_layers(model) == list(model.attention_instances.values())
    assert verify.windows(model)


@pytest.mark.parametrize("sinks", [None, "sinks", "attention_sink_bias"])
def test_sinks_of_layers_in_bf16_are_refused(monkeypatch, sinks):
    """At the start, where a module holds them beside its attention; those of layers in INT4 are welcome."""
    attention = torch.nn.Module()
    attention.attn = RadixAttention(H_Q, D, D**-0.5, H_KV, layer_id=0)
    attention.register_parameter(sinks or "weight", torch.nn.Parameter(torch.zeros(H_Q)))
    make_backend(monkeypatch, "k", False, layers=[attention])
    monkeypatch.setattr(bf16_layers, "backend_for", lambda model_runner: None)
    if sinks is None:
        make_backend(monkeypatch, "k", False, layers=[attention], in_bf16="0")
        return
    with pytest.raises(NotImplementedError, match="attention layer 0 has sinks.* Way out: leave it out of SAW_INT4_BF"):
        make_backend(monkeypatch, "k", False, layers=[attention], in_bf16="0")


def test_scratch_is_made_once_for_the_widest_layer(monkeypatch):
    """Whichever layer comes first: a graph keeps the address that it was captured with."""
    made = []
    backend = make_backend(monkeypatch, "k", False)
    layers = [SimpleNamespace(tp_q_head_num=heads, qk_head_dim=dim) for heads, dim in ((4, 128), (8, 64))]
    backend._workspace_shape = workspaces.decode_shape(layers)
    monkeypatch.setattr(ops, "decode_workspace", lambda *args, **options: made.append(args) or torch.zeros(1))
    for layer in layers:
        backend._workspace(SimpleNamespace(is_cuda=True, device="cuda", shape=(3, *vars(layer).values())), 3)
    assert made == [("cuda", workspaces.DECODE_ROWS, 8, 128)]


def test_unknown_arguments_are_refused(monkeypatch):
    backend = make_backend(monkeypatch, "k", False)
    batch = make_batch(backend, [0], [4])
    backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match="k_rope"):
        backend.forward_extend(torch.zeros(4, H_Q * D), None, None, make_layer(), batch, k_rope=torch.zeros(1))


WINDOW = 20


def over_two_parts(backend: Int4AttentionBackend) -> None:
    """Replace the pool by SGLang's two-part one, whose window slots lie elsewhere."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    device = backend.token_to_kv_pool.device
    backend.token_to_kv_pool = SWAKVPool(
        size=SLOTS,
        size_swa=SLOTS,
        page_size=PAGE,
        dtype=torch.uint4,
        head_num=H_KV,
        head_dim=D,
        swa_attention_layer_ids=[0],
        full_attention_layer_ids=[1],
        device=device,
        token_to_kv_pool_class=Int4KVPool,
    )
    name_layers(backend.token_to_kv_pool)
    backend._layers.clear()  # of the old pool
    mapping = torch.randperm(SLOTS // PAGE).repeat_interleave(PAGE) * PAGE + torch.arange(SLOTS) % PAGE
    backend.token_to_kv_pool.register_mapping(mapping.to(device))
    backend.window_slots = WindowSlots(backend.token_to_kv_pool, backend.req_to_token_pool.req_to_token, WINDOW)


def attend(backend, layer, batch, q, k, v):
    backend.init_forward_metadata(batch)
    run = backend.forward_decode if batch.forward_mode.is_decode() else backend.forward_extend
    return run(q, k, v, layer, batch)


@pytest.mark.parametrize("device", DEVICES)
def test_sliding_window_pool_agrees_with_a_plain_one(monkeypatch, device):
    """The same requests over one pool, and over SGLang's two-part pool."""
    torch.manual_seed(4)
    prefixes, news = [0, 70, 100, 5], [60, 130, 9, 1]
    layer = make_layer(sliding_window_size=WINDOW)
    first, then = (torch.randn(2, n, H_KV, D).bfloat16().to(device) for n in (sum(prefixes), sum(news)))
    q = torch.randn(sum(news), H_Q * D).bfloat16().to(device)
    results = []
    for two_parts in (False, True):
        torch.manual_seed(8)
        backend = make_backend(monkeypatch, "kv", False, device)
        if two_parts:
            over_two_parts(backend)
        rounds = [([0] * 4, prefixes, first, False), (prefixes, news, then, False)]
        rounds.append(([p + n for p, n in zip(prefixes, news)], [1] * 4, then[:, :4] * 2, True))
        batches = [(make_batch(backend, before, new, decode), kv) for before, new, kv, decode in rounds]
        results.append([attend(backend, layer, b, q.repeat(2, 1)[: kv.shape[1]], *kv) for b, kv in batches])
    for plain, parted in zip(*results):
        assert torch.equal(plain, parted)


@pytest.mark.parametrize("device", DEVICES)
def test_captured_graph_sees_the_next_window(monkeypatch, device):
    """What a decode step reads lies where it lay at the capture; on a GPU the graph itself is replayed."""
    torch.manual_seed(5)
    layer, prefixes = make_layer(sliding_window_size=WINDOW), [9, 130, 44, 20]
    prompts, new = (torch.randn(2, n, H_KV, D).bfloat16().to(device) for n in (sum(prefixes), 4))
    q = torch.randn(sum(prefixes), H_Q * D).bfloat16().to(device)
    backend = make_backend(monkeypatch, "kv", False, device)
    over_two_parts(backend)
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=4)
    attend(backend, layer, make_batch(backend, [0] * 4, prefixes), q, *prompts)

    step = make_batch(backend, prefixes, [1] * 4, decode=True)
    captured = make_batch(backend, [0] * 4, [1] * 4, decode=True)
    captured.seq_lens.fill_(backend.get_cuda_graph_seq_len_fill_value())
    captured.out_cache_loc.zero_()
    backend.init_forward_metadata_out_graph(captured, in_capture=True)
    replay = lambda: backend.forward_decode(q[:4], *new, layer, captured)  # noqa: E731
    if device == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            replay()  # SGLang's warm-up pass
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = replay()

    for name in ("seq_lens", "out_cache_loc"):  # the runner's buffers
        getattr(captured, name).copy_(getattr(step, name))
    kept = backend.plan
    backend.init_forward_metadata_out_graph(captured)
    if device == "cuda":
        graph.replay()
    else:
        backend.plan = kept  # its tensors are all that a graph knows
        out = replay()
    backend.window_slots = WindowSlots(backend.token_to_kv_pool, backend.req_to_token_pool.req_to_token, WINDOW)
    assert torch.equal(out, attend(backend, layer, step, q[:4], *new))


def test_slot_table_of_eager_passes_grows_by_doubling(monkeypatch):
    """Not past the lines of captured graphs' batches while those suffice; the old table is gone before the new one."""
    slots = WindowSlots(None, torch.zeros(14, 64, dtype=torch.int32), WINDOW)  # a line more than there are requests
    slots.reserve(6, 1)
    make, old = slots._buffers, None

    def buffers(*room):
        assert old is None or old() is None
        return make(*room)

    monkeypatch.setattr(slots, "_buffers", buffers)
    grown = []
    for requests, tokens in ((1, 50), (2, 50), (3, 70), (5, 60), (6, 80), (7, 7), (13, 13), (2, 90)):
        table = slots._room(requests, tokens)[0]
        grown.append(len(table))
        old = weakref.ref(table)
        del table
    assert grown == [1, 2, 4, 6, 6, 12, 13, 13]
