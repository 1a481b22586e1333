"""SGLang's own arithmetic from free memory to tokens, on a GPU that is pretended: what our workspaces leave of it."""

from __future__ import annotations

import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import test_attention
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, Phase, with_phase
from sglang.srt.plugins import load_plugins
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from transformers import LlamaConfig

from saw_int4 import env, ops
from saw_int4.format import row_bytes
from saw_int4.sglang_plugin import workspaces

pytestmark = pytest.mark.both_versions

H_Q, H_KV, D, LAYERS, CONTEXT, PAGE = 8, 2, 128, 3, 4096, 16
GB, MB = 1 << 30, 1 << 20
FREE, TOTAL, FRACTION = 10, 40, 0.8  # GB, after and before the weights were loaded
TOKEN = 2 * H_KV * row_bytes(D) * LAYERS
PLANS = 33 * MB


def scratch(device, rows, heads, head_dim, *, batch_invariant):
    """As many bytes as decode_attention asks for on no GPU that exists."""
    assert (device, heads, head_dim) == (torch.device("cuda", 1), H_Q, D)
    return (2 if batch_invariant else 1) * rows * 1000


class Settings(SimpleNamespace):
    """What is not set is off."""

    def __getattr__(self, name):
        return None


def publish(monkeypatch, bags: dict[str, Settings]) -> None:
    """Put settings in the place of a running server's, by the names of SGLang's functions that return them."""
    for name, bag in bags.items():
        getter = getattr(runtime_context, name)
        for module in [m for m in sys.modules.values() if getattr(m, "__dict__", {}).get(name) is getter]:
            monkeypatch.setattr(module, name, lambda bag=bag: bag)


@pytest.fixture
def size(monkeypatch):
    """Runs SGLang's sizing; returns its tokens."""
    load_plugins()
    monkeypatch.setattr(ops, "decode_workspace_bytes", scratch)
    monkeypatch.setattr(kv_cache_configurator, "get_available_gpu_memory", lambda *a, **kw: FREE)

    def run(*, max_bs=64, drafts=None, max_total_tokens=None, window=-1, free=FREE, dtype="int4", invariant=False):
        monkeypatch.setenv(env.RESOLVED, env.Options(calibration="none", batch_invariant=invariant).to_json())
        monkeypatch.setattr(kv_cache_configurator, "get_available_gpu_memory", lambda *a, **kw: free)
        graphs = with_phase(CudaGraphConfig(), Phase.DECODE, max_bs=max_bs)
        ranks = dict(launch_world_size=1, pp_size=1, attn_tp_size=1, attn_dcp_size=1, attn_dp_size=1)
        bags = {
            "get_parallel": Settings(**ranks, world_group=Settings()),
            "get_exec": Settings(graph=Settings(cuda_graph_config=graphs)),
            "get_spec": Settings(speculative_num_draft_tokens=drafts),
            "get_schedule": Settings(mem_fraction_static=FRACTION, page_size=PAGE, max_total_tokens=max_total_tokens),
            "get_memory": Settings(),
            "get_disagg": Settings(),
            "get_mm": Settings(),
        }
        publish(monkeypatch, bags)
        model = dict(head_dim=D, v_head_dim=D, context_len=CONTEXT, is_multimodal=False, hf_config=LlamaConfig())
        model |= dict(get_num_kv_heads=lambda *ranks: H_KV, linear_attn_registry_result=None)
        kvc = object.__new__(KVCacheConfigurator)
        values = dict(
            device="cuda",
            gpu_id=1,
            attn_dp_size=1,
            model=torch.nn.ModuleList(
                RadixAttention(H_Q, D, D**-0.5, H_KV, layer_id=i, sliding_window_size=window) for i in range(LAYERS)
            ),
            model_config=Settings(**model),
            model_dtype=torch.bfloat16,
            kv_cache_dtype=torch.uint4 if dtype == "int4" else torch.bfloat16,
            kv_cache_dtype_str=dtype,
            sliding_window_size=None,
            is_hybrid_swa=False,
            is_hybrid_swa_compress=False,
            is_draft_worker=False,
            use_mla_backend=False,
            mambaish_config=None,
            server_args=Settings(),
            spec_aux_config=Settings(),
            kv_shard_spec=None,
            spec_algorithm=SpeculativeAlgorithm.from_string("NGRAM" if drafts else None),
            layer_info=Settings(start_layer=0, end_layer=LAYERS, num_effective_layers=LAYERS),
        )
        for name in {field.name for field in fields(KVCacheConfigurator)} & values.keys():
            setattr(kvc, name, values[name])
        return kvc.config_from_budget(kvc._profile_available_bytes(TOTAL)).max_total_num_tokens

    return run


def tokens(beside: int, free: float = FREE) -> int:
    """Whole pages in what SGLang gives the pool, ``beside`` bytes less."""
    budget = int((free - TOTAL * (1 - FRACTION)) * GB) - beside
    return budget // TOKEN // PAGE * PAGE


def test_tokens(size, caplog):
    """Exact: every byte that the backend will hold is missing from the pool."""
    beside = 128 * MB + 8192 * 1000 + PLANS
    with caplog.at_level("INFO"):
        assert size() == tokens(beside) < tokens(0)
    assert f"saw_int4: {beside / MB:.1f} MB beside the KV pool, out of its budget: gathered keys" in caplog.text


def test_drafts_and_windows(size):
    rows, window = 64 * 200, 300
    cells = rows * (window + 1)
    parts = [128 * MB, rows * 1000, PLANS, cells * 4, workspaces.DRAFT_CELLS * 8 * 5]
    assert size(drafts=200, window=window) == tokens(sum(parts))
    wide = 100_000  # its keys do not fit the usual workspace twice
    parts = [2 * wide * 2 * H_KV * D * 2, 8192 * 1000, PLANS, 64 * (wide + 1) * 4]
    assert size(window=wide) == tokens(sum(parts))
    assert size(invariant=True) == tokens(128 * MB + 2 * 64 * 1000 + PLANS)


@pytest.mark.parametrize(("two_parts", "requests", "running"), [(False, 4, None), (True, 4, None), (True, 2, 3)])
def test_what_the_backend_holds(monkeypatch, two_parts, requests, running):
    """Its tensors against the figures: with buffers for graphs of so many requests, and a pass that fits none of them.

    That has as many requests, or all that may be running.
    """
    drafts = 8
    module = RadixAttention(test_attention.H_Q, test_attention.D, 1.0, test_attention.H_KV, layer_id=0)
    module.sliding_window_size = test_attention.WINDOW
    backend = test_attention.make_backend(monkeypatch, "k", False, layers=[module])
    if two_parts:
        test_attention.over_two_parts(backend)
    backend.init_cuda_graph_state(requests, requests * drafts)
    held = backend._verify_buffers.lines.nbytes
    if two_parts:
        rooms = ((requests, requests), (running or requests, requests * drafts + 1))
        tables = [backend.window_slots._room(*room)[0] for room in rooms]
        assert tables[0] is not tables[1]
        held += sum(table.nbytes for table in tables)

    monkeypatch.setattr(ops, "decode_workspace_bytes", lambda *args, **options: 0)
    monkeypatch.setattr(workspaces, "DRAFT_CELLS", 0)  # of what verifications hold for a moment
    graphs = with_phase(CudaGraphConfig(), Phase.DECODE, max_bs=requests)
    exec_, spec = Settings(graph=Settings(cuda_graph_config=graphs)), Settings(speculative_num_draft_tokens=drafts)
    publish(monkeypatch, {
        "get_exec": exec_,
        "get_spec": spec,
        "get_schedule": Settings(max_running_requests=running),
    })  # fmt: skip
    context = backend.req_to_token_pool.req_to_token.shape[1]
    kvc = dict(model=torch.nn.ModuleList([module]), model_config=Settings(context_len=context))
    kvc |= dict(device="cuda", gpu_id=0, model_dtype=torch.float32, is_hybrid_swa=two_parts)
    parts = workspaces.beside_the_pool(Settings(**kvc))
    assert parts["gathered keys and values"] == backend._gathered.nbytes
    assert parts["slots of sliding windows"] == held > 0


def test_operators_limit(size):
    assert size(max_total_tokens=5000) == 5000 // PAGE * PAGE


def test_too_little(size):
    with pytest.raises(ValueError, match="100.0 MB are left for the KV cache, and its workspaces need 168.8 .*"):
        size(free=TOTAL * (1 - FRACTION) + 100 / 1024)


def test_other_caches_are_left_alone(size):
    free = int((FREE - TOTAL * (1 - FRACTION)) * GB)
    assert size(dtype="auto") == free // (2 * H_KV * D * 2 * LAYERS) // PAGE * PAGE


@pytest.mark.parametrize(
    ("algorithm", "dtype", "more"), [("EAGLE", "int4", True), ("EAGLE", "auto", False), (None, "int4", False)]
)
def test_lines_of_slots_hold_what_is_reserved(monkeypatch, algorithm, dtype, more):
    """Trees of 8 branches and 5 steps in pages of one token, of which 16 drafts are verified."""
    load_plugins()
    bags = {
        "get_model": Settings(kv_cache_dtype=dtype),
        "get_spec": Settings(
            speculative_algorithm=algorithm,
            speculative_num_steps=5,
            speculative_eagle_topk=8,
            speculative_num_draft_tokens=16 if algorithm else None,
        ),
        "get_parallel": Settings(attn_dcp_size=1, attn_cp_size=1),
        "get_memory": Settings(page_size=1),
        "get_schedule": Settings(page_size=1),
    }
    publish(monkeypatch, bags)
    counted = 4 + (16 if algorithm else 0)
    assert kv_cache_configurator.get_req_to_token_extra_context_len() == (2 * 8 * 5 if more else counted)
