"""What the INT4 cache does not serve: each refused at start-up, with subject, reason and way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from saw_int4.env import BF16_LAYERS, Options
from saw_int4.sglang_plugin.names import (
    ATTENTION_BACKEND,
    KV_CACHE_DTYPE,
    MAX_DRAFTS,
    NGRAM,
    WITH_DRAFT_MODEL,
    sglang_version,
)
from saw_int4.sglang_plugin.transfers import STORAGE_BACKENDS


@dataclass(frozen=True)
class Refusal:
    """One server argument that may not hold certain values."""

    field: str
    refused: Callable[[Any], bool]
    reason: str
    way_out: str


def _on(value) -> bool:
    return bool(value)


def _parallel(value) -> bool:
    return (value or 1) > 1


_OTHER_POOL = "it replaces the KV pool by one that knows nothing of INT4 rows"
_PADDED = "the batches that data-parallel attention pads were not tested"
_OTHER_KERNELS = "its kernels read and write KV themselves, and know nothing of INT4 rows"

REFUSALS = [
    Refusal(
        "hicache_mem_layout",
        lambda v: v in ("page_head", "page_first_kv_split"),
        "it takes a token's heads apart, in units that a row does not fill",
        "use page_first",
    ),
    Refusal("hicache_host_memory_mode", lambda v: v not in (None, "cache"), "it was not tested", "use cache"),
    Refusal(
        "hicache_storage_backend",
        lambda v: v not in STORAGE_BACKENDS,
        "only the file backend's keys were shown to name the INT4 format",
        "use file",
    ),
    Refusal("enable_lmcache", _on, "LMCache copies KV in shapes of its own", "drop it"),
    Refusal("enable_flexkv", _on, "FlexKV copies KV in shapes of its own", "drop it"),
    Refusal("enable_unified_cache_external_linker", _on, "the external cache does not know INT4 rows", "drop it"),
    Refusal("disaggregation_decode_enable_offload_kvcache", _on, "it was not tested", "drop it"),
    Refusal("disaggregation_decode_enable_radix_cache", _on, "it was not tested", "drop it"),
    Refusal("enable_pd_role_switch", _on, "it was not tested", "drop it"),
    Refusal(
        "speculative_algorithm",
        lambda v: v is not None and v.upper() not in (NGRAM, *WITH_DRAFT_MODEL, "NEXTN"),  # the last becomes EAGLE
        "it was not tested over INT4 rows",
        f"use {NGRAM} or {', '.join(WITH_DRAFT_MODEL)}",
    ),
    Refusal("decoupled_spec_role", lambda v: v not in (None, "null"), "it was not tested over INT4 rows", "drop it"),
    Refusal("enable_multi_layer_eagle", _on, "its several draft caches were not tested", "drop it"),
    Refusal("speculative_adaptive", _on, "it replaces the attention backend while serving", "drop it"),
    Refusal(
        "speculative_draft_kv_cache_dtype",
        lambda v: v not in (None, "auto"),
        "a draft model's cache is sized in the model's own dtype",
        "drop it",
    ),
    Refusal(
        "speculative_num_draft_tokens",
        lambda v: (v or 0) > MAX_DRAFTS,
        f"at most {MAX_DRAFTS} drafts are verified at once",
        f"set it to {MAX_DRAFTS} or less",
    ),
    Refusal("enable_unified_memory", _on, _OTHER_POOL, "drop it"),
    Refusal("enable_page_major_kv_layout", _on, _OTHER_POOL, "drop it"),
    Refusal("enable_hisparse", _on, _OTHER_POOL, "drop it"),
    Refusal("enable_kv_cache_sharding", _on, _OTHER_POOL, "drop it"),
    Refusal("enable_nvidia_megakernel", _on, _OTHER_KERNELS, "drop it"),
    Refusal("enable_amd_monokernel", _on, _OTHER_KERNELS, "drop it"),
    Refusal("prefill_only_disable_kv_cache", _on, "without a KV cache there is nothing to quantize", "drop either"),
    Refusal("is_embedding", _on, "an embedding server keeps no KV cache worth quantizing", "drop int4"),
    Refusal("dcp_size", _parallel, "decode context parallelism stores masked KV", "set it to 1"),
    Refusal("attn_cp_size", _parallel, "context parallelism splits KV across ranks", "set it to 1"),
    Refusal("attn_dp_size", _parallel, _PADDED, "set it to 1"),
    Refusal("enable_dp_attention", _on, _PADDED, "drop it"),
    Refusal("enable_pdmux", _on, "its second attention backend was not tested", "drop it"),
    Refusal("enable_two_batch_overlap", _on, "its split batches were not tested", "drop it"),
    Refusal("dllm_algorithm", _on, "diffusion decoding rewrites KV of a block", "drop it"),
    Refusal("enable_torch_compile", _on, "the attention backend was not tested under torch.compile", "drop it"),
    Refusal("enable_deterministic_inference", _on, "SGLang allows it for backends of its own list only", "drop it"),
    Refusal("kv_canary", lambda v: v not in (None, "none"), "the canary wraps SGLang's own pool classes", "drop it"),
]


def check(server_args, options: Options) -> None:
    """ValueError for the first thing that the INT4 cache cannot serve."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolved_view

    view = resolved_view(server_args)
    check_arguments(view)
    check_speculation(view.speculative_algorithm)
    check_dtype(server_args)
    check_environment()
    check_backends(server_args)
    check_model(server_args, options)
    check_kernels(view.device)
    model = model_config_of(server_args)
    check_bf16_layers(options, model, view)
    check_host_tier(options, model, view)
    check_disaggregation(model, view)
    check_prefill_graph(view.cuda_graph_config)


def check_arguments(view) -> None:
    """ValueError for the first argument that holds what is refused. Of the resolved record: SGLang changes some."""
    for refusal in REFUSALS:
        value = getattr(view, refusal.field, None)
        if refusal.refused(value):
            flag = "--" + refusal.field.replace("_", "-")
            raise ValueError(
                f"--kv-cache-dtype int4 and {flag} {value}: not supported together: {refusal.reason}. "
                f"Way out: {refusal.way_out}, or use another --kv-cache-dtype."
            )


def check_speculation(algorithm: str | None) -> None:
    """ValueError for speculation that this SGLang, or a platform outside it, cannot do: SGLang asks for some kinds."""
    from sglang.srt.environ import envs
    from sglang.srt.platforms import current_platform

    if not algorithm:
        return
    algorithm = {"NEXTN": "EAGLE"}.get(algorithm.upper(), algorithm.upper())
    if algorithm in WITH_DRAFT_MODEL and sglang_version() == "0.5.21":
        raise ValueError(
            f"--kv-cache-dtype int4 and --speculative-algorithm {algorithm}: draft models were tested with SGLang "
            "0.5.23 only, this is 0.5.21. Way out: use NGRAM, or SGLang 0.5.23."
        )
    if algorithm in WITH_DRAFT_MODEL and envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get():
        raise ValueError(
            "--kv-cache-dtype int4: SGLANG_ENABLE_OVERLAP_PLAN_STREAM is set: verification would be planned before its "
            "drafts are known. Unset it."
        )
    if current_platform.is_out_of_tree() and not current_platform.supports_speculative_algorithm(algorithm):
        raise ValueError(
            f"--speculative-algorithm {algorithm}: {type(current_platform).__name__} does not support it under this "
            "version of SGLang. Way out: drop it."
        )


def check_bf16_layers(options: Options, model, view) -> None:
    """ValueError where layers cannot stay in BF16: SGLang's own attention serves them, over one pool."""
    layers = options.for_model(model.num_hidden_layers).bf16_layers
    problem = None
    if layers and view.speculative_algorithm:
        problem = "are not served with speculative decoding"
    elif layers and view.enable_hierarchical_cache:
        problem = "do not fit into HiCache's host pools, whose rows are of one size"
    elif layers and view.disaggregation_mode != "null":
        problem = "were not tested with prefill and decode on two servers"
    elif layers and model.dtype != torch.bfloat16:
        problem = f"need a model in bfloat16 (--dtype bfloat16), this one is in {model.dtype}"
    if problem is not None:
        raise ValueError(f"{BF16_LAYERS} (--saw-bf16-layers): layers {layers} {problem}. Way out: leave it out.")


def check_host_tier(options: Options, model, view) -> None:
    """ValueError for host pools (HiCache's, or those of a decode server's retracted requests) that rows do not suit."""
    backup = view.disaggregation_mode == "decode" and view.disaggregation_decode_retraction_backup != "cpu_tensor"
    if not (view.enable_hierarchical_cache or backup):
        return
    tokens = [model.get_num_kv_heads(view.tp_size) * options.kv_format(model.head_dim).row_bytes]
    if model.is_hybrid_swa:
        tokens.append(model.get_swa_num_kv_heads(view.tp_size) * options.kv_format(model.swa_head_dim).row_bytes)
    direct = view.hicache_io_backend == "direct" or view.hicache_mem_layout == "page_first_direct"
    if sglang_version() == "0.5.21":
        problem, way_out = "SGLang 0.5.21 does not ask the KV pool how long its rows are", "use SGLang 0.5.23"
    elif view.speculative_algorithm not in (None, NGRAM):
        problem, way_out = "a draft model's cache was not tested with it", f"use {NGRAM}"
    elif view.device == "cpu" and not direct:
        problem = f"--hicache-io-backend {view.hicache_io_backend} is a CUDA kernel, this is plain CPU"
        way_out = "add --hicache-io-backend direct"
    elif view.device == "cuda" and view.hicache_mem_layout == "page_first_direct":
        problem = "copies for --hicache-mem-layout page_first_direct failed on the one GPU they were tried on"
        way_out = "add --hicache-mem-layout layer_first, or page_first with --hicache-io-backend kernel"
    elif not direct and any(token % 8 for token in tokens):
        sizes = " and ".join(map(str, tokens))
        problem = f"K of a token is {sizes} bytes on a rank, SGLang's transfer kernel takes multiples of 8"
        way_out = "add --hicache-io-backend direct --hicache-mem-layout layer_first"
    elif view.hicache_storage_backend is not None and (problem := _nameless(view.model_path)):
        way_out = "drop --hicache-storage-backend"
    else:
        return
    raise ValueError(f"--kv-cache-dtype int4 and a host tier (HiCache): {problem}. Way out: {way_out}.")


def _nameless(model_path: str) -> str | None:
    """Why storage keys cannot name this model; None when they can."""
    from saw_int4.calibration.fingerprint import checkpoint_folder, model_fingerprint

    try:
        model_fingerprint(checkpoint_folder(model_path))
    except ValueError as error:
        return f"storage keys name the model, and {error}"
    return None


def check_disaggregation(model, view) -> None:
    """ValueError for prefill and decode on two servers in ways that were not shown to work."""
    if view.disaggregation_mode in (None, "null"):
        return
    if sglang_version() == "0.5.21":
        problem, way_out = "SGLang 0.5.21 does not compare the formats of two KV pools", "use SGLang 0.5.23"
    elif view.disaggregation_transfer_backend not in ("mooncake", "mooncake_tcp"):
        problem = f"--disaggregation-transfer-backend {view.disaggregation_transfer_backend} was not tested"
        way_out = "use mooncake, or mooncake_tcp"
    elif model.is_hybrid_swa and not view.disable_hybrid_swa_memory:
        problem, way_out = "a sliding-window pool was not tested with it", "add --disable-hybrid-swa-memory"
    elif view.speculative_algorithm:
        problem, way_out = "speculative decoding was not tested with it", "drop --speculative-algorithm"
    elif view.pp_size > 1:
        problem, way_out = "pipeline parallelism was not tested with it", "set --pp-size 1"
    elif view.disaggregation_decode_host_receive_threshold < 1:
        problem, way_out = "receiving into host memory was not tested", "set the threshold to 1"
    else:
        return
    raise ValueError(
        f"--kv-cache-dtype int4 and --disaggregation-mode {view.disaggregation_mode}: {problem}. Way out: {way_out}."
    )


def check_dtype(server_args) -> None:
    """ValueError when SGLang decided on another cache than the one asked for."""
    from sglang.srt.arg_groups.overrides import resolved_view

    resolved = resolved_view(server_args).kv_cache_dtype
    if resolved != KV_CACHE_DTYPE:
        raise ValueError(
            f"--kv-cache-dtype int4: SGLang changed it to {resolved!r} for this model. "
            "Way out: use another --kv-cache-dtype."
        )


def check_environment() -> None:
    """ValueError for variables of SGLang that change how KV is laid out, sized or sent."""
    from sglang.srt.environ import envs

    layouts = ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_USE_HND_KVCACHE", "SGLANG_DISAGG_STAGING_BUFFER")
    for name in layouts:
        if getattr(envs, name).get():
            raise ValueError(f"--kv-cache-dtype int4: {name} is set, which lays KV out differently. Unset it.")


def check_prefill_graph(config) -> None:
    """ValueError for prefill graphs that capture attention: its plan reads lengths on the host."""
    if config.prefill.backend not in ("disabled", "breakable"):
        raise ValueError(
            f"--kv-cache-dtype int4: the prefill CUDA graph is {config.prefill.backend!r}, expected breakable or "
            "disabled. Way out: --cuda-graph-backend-prefill breakable."
        )


def check_backends(server_args) -> None:
    """ValueError unless prefill and decode both run on our backend: no other one can read INT4 rows."""
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view

    names = attention_backends_of(resolved_view(server_args))
    if set(names) != {ATTENTION_BACKEND}:
        raise ValueError(
            f"--kv-cache-dtype int4: the attention backends are prefill={names[0]} and decode={names[1]}, expected "
            f"{ATTENTION_BACKEND} for both, the only one that reads INT4 rows. Way out: drop --attention-backend, "
            "--prefill-attention-backend and --decode-attention-backend; int4 selects its own."
        )


def check_linear_attention(server_args) -> None:
    """ValueError for hybrid models. Before SGLang adjusts them, which fails on some platforms."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.configs.hybrid_arch import mambaish_config

    model = model_config_of(server_args)
    if mambaish_config(model) is not None:
        raise ValueError(
            f"--kv-cache-dtype int4: {architecture(model)} has linear-attention or state-space layers, whose backend "
            "wraps that of the others and was not tested over INT4 rows. Way out: use another --kv-cache-dtype."
        )


def architecture(model) -> str:
    return (model.hf_config.architectures or ["this model"])[0]


def check_model(server_args, options: Options) -> None:
    """ValueError for a model whose KV the rows cannot hold."""
    from sglang.srt.arg_groups.overrides import model_config_of, use_mla_backend

    model = model_config_of(server_args)
    name = architecture(model)
    if use_mla_backend(server_args):
        raise ValueError(
            f"--kv-cache-dtype int4: {name} uses multi-head latent attention (MLA): it caches one compressed vector "
            "per token, not keys and values per head. Way out: use --kv-cache-dtype fp8_e4m3 or auto."
        )
    if model.is_encoder_decoder:
        raise ValueError(
            f"--kv-cache-dtype int4: {name} has cross attention, which the INT4 backend does not serve. "
            "Way out: use another --kv-cache-dtype."
        )
    if name == "Gemma3ForConditionalGeneration" and server_args.enable_multimodal:
        raise ValueError(
            f"--kv-cache-dtype int4: the image tokens of {name} attend to each other both ways, the INT4 backend looks "
            "back only. Way out: drop --enable-multimodal, or use another --kv-cache-dtype."
        )
    if model.head_dim != model.v_head_dim:
        raise ValueError(
            f"--kv-cache-dtype int4: {name} has K head_dim {model.head_dim} and V head_dim {model.v_head_dim}, "
            "expected equal ones. Way out: use another --kv-cache-dtype."
        )
    options.kv_format(model.head_dim)
    if (calibration := options.load_calibration()) is not None:
        from saw_int4.calibration.fingerprint import checkpoint_folder, model_fingerprint

        calibration.check(
            model=model_fingerprint(checkpoint_folder(server_args.model_path)),
            num_kv_heads=model.get_total_num_kv_heads(),
            layers=list(range(model.num_attention_layers)),
        )


def check_kernels(device: str) -> None:
    """ValueError when this build has no kernels for the device."""
    from saw_int4 import ops  # noqa: F401  (registers the operators)

    if torch.version.hip is not None:
        raise ValueError("--kv-cache-dtype int4: ROCm stores K inside its fused RoPE kernel, past the INT4 rows.")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("saw_int4::append_kv", key):
        raise ValueError(
            f"--kv-cache-dtype int4: this build of saw_int4 has no kernels for device {device!r}. "
            "Way out: rebuild where nvcc is found (pip install --no-build-isolation .), or serve on CPU."
        )
