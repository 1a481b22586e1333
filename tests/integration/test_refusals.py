"""What cannot work is refused in the process that starts the server, before anything is spawned."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import gpt_oss, qwen3
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from saw_int4 import env
from saw_int4.sglang_plugin import register, verify
from saw_int4.sglang_plugin.names import FINGERPRINT_ATTRIBUTE, sglang_version

pytestmark = pytest.mark.both_versions

UNCALIBRATED = env.Options(calibration="none")


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    load_plugins()
    for name in (env.ROTATION, env.ROTATION_ORDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(env.CALIBRATION, "none")
    monkeypatch.setenv(env.RESOLVED, "")


@pytest.fixture(scope="module")
def tiny(model, tmp_path_factory):
    return qwen3(model, tmp_path_factory.mktemp("qwen3") / "model")


def start(model, **arguments) -> ServerArgs:
    """What the launching process does with its arguments."""
    arguments = {"kv_cache_dtype": "int4", **arguments}
    args = ServerArgs(model_path=str(model), **arguments)
    args.resolve_once()
    return args


def test_accepted(model):
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view

    args = start(model)
    assert attention_backends_of(resolved_view(args)) == ("saw_int4", "saw_int4")
    assert getattr(args, FINGERPRINT_ATTRIBUTE) == env.published().fingerprint == UNCALIBRATED.fingerprint


@pytest.mark.parametrize("named", [{}, {"attention_backend": "saw_int4"}])
def test_a_model_with_a_list_of_backends_of_its_own(model, tmp_path, named):
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view

    args = start(gpt_oss(model, tmp_path / "model"), **named)
    assert attention_backends_of(resolved_view(args)) == ("saw_int4", "saw_int4")


def test_a_model_that_cannot_be_calibrated_is_served_without(tiny, tmp_path, monkeypatch, caplog):
    """As under --load-format dummy: a folder without weights."""
    for file in tiny.glob("*.json"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv(env.CALIBRATION, "auto")
    start(tmp_path)
    assert env.published() == UNCALIBRATED
    assert "serving without calibration" in caplog.text and "weights" in caplog.text


def test_other_caches_are_left_alone(model):
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view

    args = start(model, kv_cache_dtype="auto", disable_radix_cache=True)
    assert attention_backends_of(resolved_view(args)) == ("torch_native", "torch_native")
    assert not hasattr(args, FINGERPRINT_ATTRIBUTE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"attention_backend": "torch_native"}, "attention backends are prefill=torch_native"),
        ({"attention_backend": "saw_int4", "decode_attention_backend": "triton"}, "decode=triton"),
        ({"prefill_attention_backend": "torch_native"}, "prefill=torch_native"),
        ({"is_embedding": True}, "is-embedding"),
        ({"enable_two_batch_overlap": True}, "two-batch-overlap"),
        ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, "data-parallel attention"),
        ({"enable_torch_compile": True}, "torch-compile"),
        ({"kv_canary": "log"}, "kv-canary"),
        ({"speculative_algorithm": "DFLASH"}, "was not tested over INT4 rows"),
        ({"speculative_algorithm": "EAGLE3"}, "was not tested over INT4 rows"),
        ({"speculative_algorithm": "EAGLE", "enable_multi_layer_eagle": True}, "several draft caches"),
        ({"speculative_algorithm": "EAGLE", "speculative_draft_kv_cache_dtype": "fp8_e4m3"}, "model's own dtype"),
        ({"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 65}, "at most 64"),
        ({"enable_hierarchical_cache": True, "hicache_mem_layout": "page_head"}, "use page_first"),
        ({"enable_hierarchical_cache": True, "hicache_storage_backend": "mooncake"}, "use file"),
    ],
)
def test_arguments(model, arguments, said):
    with pytest.raises((ValueError, AssertionError), match=said):
        start(model, **arguments)


def test_ngram(model):
    """SGLang 0.5.21 asks no platform outside it for a worker, and its own needs kernels that plain CPU has not."""
    if sglang_version() == "0.5.21":
        with pytest.raises(ValueError, match="CpuPlatform does not support it"):
            start(model, speculative_algorithm="NGRAM")
    else:
        start(model, speculative_algorithm="NGRAM")


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN", "STANDALONE"])
def test_draft_models(model, monkeypatch, algorithm):
    """Their attention is SGLang's. Under 0.5.21 nobody tried."""
    from sglang.srt.arg_groups.overrides import resolved_view

    drafts = {"speculative_num_steps": 2, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 3}
    arguments = {"speculative_algorithm": algorithm, "speculative_draft_model_path": str(model), **drafts}
    if sglang_version() == "0.5.21":
        with pytest.raises(ValueError, match="tested with SGLang 0.5.23 only"):
            start(model, **arguments)
        return
    assert resolved_view(start(model, **arguments)).speculative_draft_attention_backend == "torch_native"
    monkeypatch.setenv("SGLANG_ENABLE_OVERLAP_PLAN_STREAM", "1")
    with pytest.raises(ValueError, match="PLAN_STREAM"):
        start(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "float16"}, "need a model in bfloat16"),
        ({"speculative_algorithm": "NGRAM"}, "with speculative decoding|does not support it"),
        ({"enable_hierarchical_cache": True, "hicache_io_backend": "direct"}, "rows are of one size"),
        ({"disaggregation_mode": "prefill"}, "prefill and decode on two servers"),
    ],
)
def test_layers_that_cannot_stay_in_bf16(model, monkeypatch, arguments, said):
    monkeypatch.setenv(env.BF16_LAYERS, "0")
    with pytest.raises(ValueError, match=said):
        start(model, **arguments)


OLD = "0.5.21"
STANDALONE = {"speculative_algorithm": "STANDALONE", "speculative_num_steps": 2, "speculative_eagle_topk": 1,
              "speculative_num_draft_tokens": 3}  # fmt: skip
HICACHE = {"enable_hierarchical_cache": True, "hicache_io_backend": "direct"}
PREFILL = {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "mooncake_tcp"}
DECODE = {**PREFILL, "disaggregation_mode": "decode", "hicache_io_backend": "direct"}


@pytest.mark.parametrize("arguments", [HICACHE, {**HICACHE, "hicache_storage_backend": "file"}, PREFILL, DECODE])
def test_rows_that_leave_the_pool(model, arguments):
    if sglang_version() == OLD:
        with pytest.raises(ValueError, match="SGLang 0.5.21 does not .* use SGLang 0.5.23"):
            start(model, **arguments)
    else:
        start(model, **arguments)


@pytest.mark.skipif(sglang_version() == OLD, reason="all of it is refused")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"enable_hierarchical_cache": True}, "kernel is a CUDA kernel, this is plain CPU"),
        ({**HICACHE, **STANDALONE}, "a draft model's cache was not tested"),
        ({**DECODE, "hicache_io_backend": "kernel"}, "add --hicache-io-backend direct"),
        ({**PREFILL, "disaggregation_transfer_backend": "nixl"}, "use mooncake"),
        ({**PREFILL, "speculative_algorithm": "NGRAM"}, "speculative decoding was not tested"),
        ({**DECODE, "disaggregation_decode_enable_radix_cache": True}, "radix-cache"),
    ],
)
def test_rows_that_cannot_leave_the_pool(model, arguments, said):
    with pytest.raises(ValueError, match=said):
        start(model, **{**arguments, "speculative_draft_model_path": str(model)})


@pytest.mark.skipif(sglang_version() == OLD, reason="all of it is refused")
def test_kernels_that_cannot_copy_a_token(model):
    """SmolLM2 has 3 KV heads: 108 bytes of K, which SGLang's CUDA kernel would refuse at the first transfer."""
    from types import SimpleNamespace

    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    from saw_int4.sglang_plugin.refusals import check_host_tier

    args = start(model, **HICACHE)
    view, shape = resolved_view(args), model_config_of(args)

    def on_gpu(**changes):
        names = ("tp_size", "disaggregation_mode", "enable_hierarchical_cache",
                 "hicache_mem_layout", "hicache_storage_backend", "speculative_algorithm")  # fmt: skip
        kept = {name: getattr(view, name) for name in names}
        return SimpleNamespace(**{**kept, "device": "cuda", "hicache_io_backend": "kernel", **changes})

    kernel = on_gpu(hicache_mem_layout="page_first")
    with pytest.raises(ValueError, match="K of a token is 108 bytes on a rank"):
        check_host_tier(UNCALIBRATED, shape, kernel)
    direct = {"hicache_io_backend": "direct"}
    check_host_tier(UNCALIBRATED, shape, on_gpu(**direct, hicache_mem_layout="layer_first"))
    with pytest.raises(ValueError, match="copies for --hicache-mem-layout page_first_direct"):
        check_host_tier(UNCALIBRATED, shape, on_gpu(**direct, hicache_mem_layout="page_first_direct"))
    even = dict(get_num_kv_heads=lambda tp: 2, head_dim=64, is_hybrid_swa=False)
    check_host_tier(UNCALIBRATED, SimpleNamespace(**even), kernel)
    windows = {**even, "get_swa_num_kv_heads": lambda tp: 3, "swa_head_dim": 64, "is_hybrid_swa": True}
    with pytest.raises(ValueError, match="K of a token is 72 and 108 bytes"):
        check_host_tier(UNCALIBRATED, SimpleNamespace(**windows), kernel)


@pytest.mark.skipif(sglang_version() == OLD, reason="all of it is refused")
def test_storage_of_a_model_without_weights(tiny, tmp_path):
    for file in tiny.glob("*.json"):
        shutil.copy(file, tmp_path)
    start(tmp_path, **HICACHE)
    with pytest.raises(ValueError, match="storage keys name the model, and .* expected a folder with config.json and"):
        start(tmp_path, **HICACHE, hicache_storage_backend="file")


def test_every_refused_field_exists():
    """A refusal that reads a field SGLang no longer has would refuse nothing."""
    import msgspec

    from saw_int4.sglang_plugin.refusals import REFUSALS

    fields = {field.name for field in msgspec.structs.fields(ServerArgs)}
    unknown = {refusal.field for refusal in REFUSALS} - fields
    later = {"attn_dp_size", "enable_kv_cache_sharding", "enable_nvidia_megakernel", "enable_amd_monokernel"}
    assert unknown == (later if sglang_version() == "0.5.21" else set())


def test_prefill_graph():
    from types import SimpleNamespace

    from saw_int4.sglang_plugin.refusals import check_prefill_graph

    for backend in ("disabled", "breakable"):
        check_prefill_graph(SimpleNamespace(prefill=SimpleNamespace(backend=backend)))
    with pytest.raises(ValueError, match="expected breakable or disabled"):
        check_prefill_graph(SimpleNamespace(prefill=SimpleNamespace(backend="full")))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SAW_INT4_ROTATION": "maybe"}, "expected one of"),
        ({"SAW_INT4_ROTATION_ORDER": "128"}, "divides head_dim 64"),
        ({"SAW_INT4_ROTATION": "none", "HADAMARD": "1"}, "Unset one of them"),
        ({"SAW_INT4_BF16_LAYERS": "first:31"}, "layers 0 to 29"),
        ({"SGLANG_USE_HND_KVCACHE": "1"}, "SGLANG_USE_HND_KVCACHE"),
        ({"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}, "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        ({"SGLANG_DISAGG_STAGING_BUFFER": "1"}, "SGLANG_DISAGG_STAGING_BUFFER"),
    ],
)
def test_variables(model, monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        start(model)


def test_head_dim(model, tmp_path):
    with pytest.raises(ValueError, match="head_dim is 24, expected a positive multiple of 16"):
        start(qwen3(model, tmp_path / "odd", head_dim=24))


def test_mla(model, tmp_path):
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        num_hidden_layers=2, vocab_size=512, hidden_size=64, architectures=["DeepseekV3ForCausalLM"]
    )
    config.save_pretrained(tmp_path / "mla")
    with pytest.raises(ValueError, match="MLA"):
        start(tmp_path / "mla", skip_tokenizer_init=True)


def test_images_that_attend_both_ways(tmp_path):
    """SGLang serves Gemma 3 without images unless it is asked for them."""
    from transformers import Gemma3Config, Gemma3TextConfig

    text = Gemma3TextConfig(num_hidden_layers=2, vocab_size=512, hidden_size=64, head_dim=64)
    Gemma3Config(text_config=text, architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(
        tmp_path / "images"
    )
    start(tmp_path / "images", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="drop --enable-multimodal"):
        start(tmp_path / "images", skip_tokenizer_init=True, enable_multimodal=True)


def test_linear_attention(tmp_path):
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(num_hidden_layers=4, vocab_size=512, hidden_size=64)
    config.architectures = ["Qwen3NextForCausalLM"]
    config.save_pretrained(tmp_path / "linear")
    with pytest.raises(ValueError, match="Qwen3NextForCausalLM has linear-attention"):
        start(tmp_path / "linear", skip_tokenizer_init=True)


def test_device_without_kernels(model, monkeypatch):
    from saw_int4.sglang_plugin import refusals

    with pytest.raises(ValueError, match="no kernels for device 'npu'"):
        refusals.check_kernels("npu")


def test_untested_version(monkeypatch):
    monkeypatch.setattr(verify, "sglang_version", lambda: "0.9.9")
    with pytest.raises(RuntimeError, match="tested are 0.5.21, 0.5.23"):
        verify.tested_version()
    monkeypatch.setenv(env.ALLOW_UNTESTED_SGLANG, "1")
    verify.tested_version()


# ---- sabotage: a seam that did not land must end the start, never change the cache --------------------------------


@pytest.mark.parametrize("target", sorted(register.hooks()))
def test_missing_hook(model, monkeypatch, target):
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target})
    with pytest.raises(SystemExit, match=target.rsplit(".", 1)[1]):
        start(model)
    with pytest.raises(SystemExit, match="No other cache is used"):
        verify.plugin_in_place()


def test_failed_registration(model, monkeypatch):
    monkeypatch.setattr(register, "_failures", ["RuntimeError: seam gone"])
    with pytest.raises(SystemExit, match="seam gone"):
        start(model)
    start(model, kv_cache_dtype="auto")  # nobody else is bothered


def test_seam_gone_at_registration(monkeypatch):
    with pytest.raises(RuntimeError, match="SGLang has no"):
        verify.target_exists("sglang.srt.mem_cache.memory_pool.NoSuchPool.method")


def test_options_that_do_not_reach_the_scheduler(model, monkeypatch):
    args = start(model)
    assert verify.options_of_parent(args) == UNCALIBRATED
    monkeypatch.setenv(env.RESOLVED, env.Options("none").to_json())  # unrotated where rotated was asked for
    with pytest.raises(SystemExit, match="fingerprint"):
        verify.options_of_parent(args)
    monkeypatch.delenv(env.RESOLVED)
    with pytest.raises(SystemExit, match="is not set"):
        verify.options_of_parent(args)


def test_parent_without_the_plugin(model):
    args = ServerArgs(model_path=str(model), kv_cache_dtype="int4")
    with pytest.raises(SystemExit, match="plugin was not active"):
        verify.scheduler_init(lambda *_: pytest.fail("served"), None, args)


RANK = """
import sys
import torch
from saw_int4.sglang_plugin.verify import across_ranks
store, rank, ours = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
across_ranks([ours], torch.distributed.group.WORLD)
"""


def test_ranks_of_different_formats(tmp_path):
    """As where one machine of several has other SAW_INT4_* variables: every rank says so and ends."""
    commands = [[sys.executable, "-c", RANK, str(tmp_path / "store"), str(i), name] for i, name in enumerate("ab")]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for rank in ranks:
        assert "the ranks hold different formats: [['a'], ['b']]" in rank.communicate(timeout=120)[1]
        assert rank.returncode != 0


class Runner:
    """What the checks look at of a model runner."""

    kv_cache_dtype_str = "int4"

    def __init__(self, args, pool):
        self.server_args, self.token_to_kv_pool = args, pool


def make_pool(cls, **more):
    return cls(
        64,
        page_size=1,
        dtype=torch.uint4 if "dtype" not in more else more.pop("dtype"),
        head_num=2,
        head_dim=64,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
        **more,
    )


def test_pools_other_than_the_one_asked_for(model, monkeypatch):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from saw_int4.sglang_plugin.pool import Int4KVPool

    args = start(model)
    verify.pool(Runner(args, make_pool(Int4KVPool)))
    with pytest.raises(SystemExit, match="the KV pool is a MHATokenToKVPool"):
        verify.pool(Runner(args, make_pool(MHATokenToKVPool, dtype=torch.bfloat16)))

    monkeypatch.setenv(env.RESOLVED, env.Options("none").to_json())
    unrotated = make_pool(Int4KVPool)
    env.publish(UNCALIBRATED)
    with pytest.raises(SystemExit, match="no rotation"):
        verify.pool(Runner(args, unrotated))

    thin = make_pool(Int4KVPool)
    thin.k_buffer[0] = thin.k_buffer[0][..., :-4].contiguous()
    with pytest.raises(SystemExit, match="K of layer 0"):
        verify.pool(Runner(args, thin))

    runner = Runner(args, make_pool(Int4KVPool))
    runner.kv_cache_dtype_str = "bf16"
    with pytest.raises(SystemExit, match="resolved --kv-cache-dtype to 'bf16'"):
        verify.pool(runner)


def test_backend_other_than_ours(model, monkeypatch):
    from saw_int4.sglang_plugin.pool import Int4KVPool

    runner = Runner(start(model), make_pool(Int4KVPool))
    runner.attn_backend = object()
    with pytest.raises(SystemExit, match="the attention backend is object"):
        verify.serving(runner)


def test_draft_cache_of_another_dtype():
    from types import SimpleNamespace

    def worker(pool_dtype):
        runner = SimpleNamespace(dtype=torch.bfloat16, token_to_kv_pool=SimpleNamespace(dtype=pool_dtype))
        return SimpleNamespace(draft_worker=SimpleNamespace(draft_runners=[runner]))

    verify.draft_caches(None)
    verify.draft_caches(worker(torch.bfloat16))
    with pytest.raises(SystemExit, match="draft model's KV pool"):
        verify.draft_caches(worker(torch.uint4))


def test_drafts_for_a_model_with_windows(model):
    """By ngrams they are verified; nobody tried another model's."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from saw_int4.sglang_plugin.backend import Int4AttentionBackend
    from saw_int4.sglang_plugin.pool import Int4KVPool

    runner = Runner(start(model), make_pool(Int4KVPool))
    runner.attn_backend = object.__new__(Int4AttentionBackend)
    runner.spec_algorithm = SpeculativeAlgorithm.STANDALONE
    layers = [
        RadixAttention(2, 64, 1.0, 2, layer_id, sliding_window_size=size) for layer_id, size in ((0, -1), (1, 32))
    ]
    runner.model = torch.nn.Sequential(*layers)
    with pytest.raises(SystemExit, match="use --speculative-algorithm NGRAM"):
        verify.serving(runner)
    assert not verify.windows(layers[0])
