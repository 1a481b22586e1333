"""Whether this SGLang still fits: every name of it that the plugin relies on, looked up without starting a server.

Start-up proves the seams anyway (``verify``); this says all that is wrong at once, and before a model is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

from saw_int4 import env
from saw_int4.finding import BROKEN, OK, WARNING, Finding
from saw_int4.sglang_plugin.names import ATTENTION_BACKEND, KV_CACHE_DTYPE, TESTED_SGLANG, sglang_version

TAKE_TESTED = f"install a tested SGLang ({', '.join(TESTED_SGLANG)}), or adapt saw_int4/sglang_plugin to this one"

# What our code reads of SGLang's objects, beside what it calls through a seam.
READS = {
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": (
        "forward_mode", "req_pool_indices", "seq_lens", "out_cache_loc", "extend_seq_lens_cpu",
        "extend_prefix_lens_cpu", "spec_info",
    ),
    "sglang.srt.speculative.ngram_info.NgramVerifyInput": ("custom_mask", "draft_token_num"),
    "sglang.srt.model_executor.forward_batch_info.ForwardMode": (
        "is_decode", "is_extend", "is_idle", "is_target_verify", "is_draft_extend_v2",
    ),
    "sglang.srt.layers.radix_attention.RadixAttention": (
        "layer_id", "tp_q_head_num", "tp_k_head_num", "qk_head_dim", "v_head_dim", "scaling", "logit_cap",
        "logit_capping_method", "sliding_window_size", "is_cross_attention", "attn_type", "xai_temperature_len",
        "use_irope",
    ),
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool": ("req_to_token",),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool": (
        "k_buffer", "v_buffer", "head_num", "head_dim", "layer_num", "start_layer", "size", "page_size",
        "get_kv_buffer", "get_kv_size_bytes", "set_kv_buffer",
    ),
    "sglang.srt.mem_cache.swa_memory_pool.SWAKVPool": (
        "full_kv_pool", "swa_kv_pool", "layers_mapping", "translate_loc_from_full_to_swa",
    ),
    "sglang.srt.configs.model_config.ModelConfig": (
        "head_dim", "v_head_dim", "is_encoder_decoder", "hf_config", "get_num_kv_heads", "is_hybrid_swa",
        "get_swa_num_kv_heads", "swa_head_dim", "context_len",
    ),
    "sglang.srt.models.transformers.TransformersBase": ("attention_instances",),
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator": (
        "model", "model_config", "model_dtype", "device", "gpu_id", "kv_cache_dtype", "kv_cache_dtype_str",
        "sliding_window_size", "is_hybrid_swa", "is_draft_worker", "layer_info", "spec_aux_config",
    ),
    "sglang.srt.managers.cache_controller.HiCacheController": (
        "mem_pool_device", "mem_pool_host", "storage_backend_type",
    ),
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager": ("scheduler",),
}  # fmt: skip

# Methods of SGLang's classes that ours replace: SGLang must still call them.
OVERRIDES = {
    "saw_int4.sglang_plugin.pool.Int4KVPool": (
        "_build_kv_buffer_descs", "_get_key_buffer", "_get_value_buffer", "_init_kv_copy_and_warmup",
        "_set_quantized_kv_buffer", "set_kv_buffer_prefix_valid",
        *(() if sglang_version() == "0.5.21" else ("_mha_buffer_info",)),  # 0.5.21 asks for no such thing
    ),
    "saw_int4.sglang_plugin.pool.CpuKVPool": ("_init_kv_copy_and_warmup",),
    "saw_int4.sglang_plugin.backend.Int4AttentionBackend": (
        "forward_decode", "forward_extend", "get_cuda_graph_seq_len_fill_value", "init_cuda_graph_state",
        "init_forward_metadata", "init_forward_metadata_in_graph", "init_forward_metadata_out_graph",
        "shared_read_ends", "support_triton", "verify_mask",
    ),
    "saw_int4.sglang_plugin.quant_method.Int4KVMethod": (
        "attention_accesses", "compute_cell_size", "create_buffers", "dequantize_prev_kv", "quantize_and_store",
    ),
}  # fmt: skip

# Keyword arguments that a wrapper with ``**kwargs`` expects SGLang to pass.
KEYWORDS = {"configure_kv_cache_dtype": "server_args_kv_cache_dtype", "build_pool": "mha_pool_class"}


def findings() -> Iterator[Finding]:
    """Every check of the installed SGLang, in the order in which a failure explains the ones after it."""
    yield from _version()
    broken = list(_modules())
    yield from broken
    if broken:
        return
    from sglang.srt.plugins import load_plugins

    load_plugins()
    yield from _seams()
    yield from _resolution_steps()
    yield from _guarded("flags", _flags)
    yield from _overrides()
    yield from _names()
    yield from _refusals()


def dry_run(argv: list[str]) -> tuple[bool, str]:
    """Resolve a server's arguments as its start does; no weights are loaded, and nothing is calibrated.

    Returns:
        Whether INT4 would be served with them, and what it would be or why not.
    """
    from sglang.srt.arg_groups.overrides import attention_backends_of, model_config_of, resolved_view
    from sglang.srt.server_args import prepare_server_args

    from saw_int4.sglang_plugin import verify

    given = os.environ.get(env.CALIBRATION)
    automatic = (given or "").strip() in ("", "auto")
    try:
        if automatic:
            os.environ[env.CALIBRATION] = "none"
        verify.plugin_in_place()
        args = prepare_server_args(argv)
        args.resolve_once()
    except (Exception, SystemExit) as error:  # noqa: BLE001  (any refusal, SGLang's own too, is an answer)
        by_parser = isinstance(error, SystemExit) and isinstance(error.code, int)
        return False, "by SGLang's parser, as printed above" if by_parser else f"{error}" or type(error).__name__
    finally:
        os.environ.pop(env.CALIBRATION, None)
        if given is not None:
            os.environ[env.CALIBRATION] = given
    backend = attention_backends_of(resolved_view(args))[1]
    kv_format = env.published().kv_format(model_config_of(args).head_dim)
    later = "; calibrated when it is first served" if automatic else ""
    return True, f"{kv_format.describe()}{later}; attention backend {backend}"


def refused_features() -> list[str]:
    """Flags of SGLang that INT4 is refused with, or with some of their values; the reason, and the way out."""
    from saw_int4.sglang_plugin.refusals import REFUSALS

    return [f"--{r.field.replace('_', '-')}: {r.reason}; {r.way_out}" for r in REFUSALS]


def _version() -> Iterator[Finding]:
    import sglang

    version, where = sglang_version(), Path(sglang.__file__).parent
    if version in TESTED_SGLANG:
        yield Finding(OK, "sglang", f"{version} at {where}, tested")
    elif env.flag(env.ALLOW_UNTESTED_SGLANG):
        yield Finding(WARNING, "sglang", f"{version} at {where}, not tested, allowed by {env.ALLOW_UNTESTED_SGLANG}")
    else:
        hint = f"{TAKE_TESTED}; {env.ALLOW_UNTESTED_SGLANG}=1 serves with this one if all else is well"
        yield Finding(BROKEN, "sglang", f"{version} at {where}, tested are {', '.join(TESTED_SGLANG)}", hint)


def _modules() -> Iterator[Finding]:
    """Import every module of the plugin: a name that SGLang no longer has fails here."""
    import saw_int4.sglang_plugin as plugin

    for module in pkgutil.iter_modules(plugin.__path__):
        name = f"{plugin.__name__}.{module.name}"
        yield from _guarded("module", lambda name=name: importlib.import_module(name), name)


def _guarded(subject: str, action: Callable, name: str = "") -> Iterator[Finding]:
    try:
        action()
    except Exception as error:  # noqa: BLE001  (whatever SGLang raises here is the finding)
        text = f"{name + ': ' if name else ''}{type(error).__name__}: {error}"
        yield Finding(BROKEN, subject, text, TAKE_TESTED)


def _seams() -> Iterator[Finding]:
    from saw_int4.sglang_plugin import register

    for reason in register.failures():
        yield Finding(
            BROKEN,
            "plugin",
            reason,
            "is saw-int4 installed (pip show saw-int4), and does SGLANG_PLUGINS, where set, name saw_int4? Without "
            "plugins, patch SGLang: scripts/apply_patches.py --apply",
        )
    wrappers = register.hooks()
    for target, how in register.seams().items():
        try:
            problem = mismatch(pkgutil.resolve_name(target), wrappers[target])
        except (ImportError, AttributeError) as error:
            problem = str(error)
        if problem:
            yield Finding(BROKEN, "seam", f"{target}: {problem}", TAKE_TESTED)
        elif how in register.HELD:  # others were reported as failures
            yield Finding(OK, "seam", f"{target}: {how}")


def mismatch(function: Callable, wrapper: Callable) -> str | None:
    """Why a wrapper ``(original, ...)`` cannot take this function's calls; None when it can."""
    theirs = list(inspect.signature(function).parameters)
    ours = list(inspect.signature(wrapper).parameters.values())[1:]
    named = [p.name for p in ours if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    keyword = KEYWORDS.get(wrapper.__name__)
    if keyword is not None and keyword not in theirs:
        return f"takes ({', '.join(theirs)}), expected {keyword} among them"
    if theirs[: len(named)] != named or (len(named) == len(ours) and len(theirs) != len(named)):
        return f"takes ({', '.join(theirs)}), expected ({', '.join(str(p) for p in ours)})"
    return None


def _resolution_steps() -> Iterator[Finding]:
    from sglang.srt.arg_groups import pipeline, resolution_hooks

    from saw_int4.sglang_plugin.server_args import RESOLUTION_STEPS

    source = inspect.getsource(pipeline)
    for step, wrapper in RESOLUTION_STEPS.items():
        if f"run_hook({step}" not in source:
            yield Finding(BROKEN, "resolution", f"SGLang's pipeline has no step {step}", TAKE_TESTED)
        elif resolution_hooks._HOOKS.get(step, []).count(wrapper) != 1:
            times = resolution_hooks._HOOKS.get(step, []).count(wrapper)
            text = f"{step} runs our wrapper {times} times, expected once"
            yield Finding(BROKEN, "resolution", text, "see the findings above: registration failed")
        else:
            yield Finding(OK, "resolution", step)


def _flags() -> None:
    """Raises unless SGLang's parser takes our values and its registry knows our backend."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from saw_int4.sglang_plugin import server_args

    server_args.extend_choices()
    if ATTENTION_BACKEND not in ATTENTION_BACKENDS:
        raise RuntimeError(f"SGLang's registry of attention backends has no {ATTENTION_BACKEND}")


def _overrides() -> Iterator[Finding]:
    for path, methods in OVERRIDES.items():
        cls = pkgutil.resolve_name(path)
        gone = [name for name in methods if not any(name in vars(base) for base in cls.__mro__[1:])]
        abstract = sorted(getattr(cls, "__abstractmethods__", ()))
        if gone:
            text = f"{cls.__base__.__name__} has no {', '.join(gone)} any more: nothing calls ours"
            yield Finding(BROKEN, "override", text, TAKE_TESTED)
        if abstract:
            text = f"{cls.__base__.__name__} asks for {', '.join(abstract)}, which {cls.__name__} does not define"
            yield Finding(BROKEN, "override", text, TAKE_TESTED)
        if not gone and not abstract:
            yield Finding(OK, "override", f"{cls.__name__}: {len(methods)} methods of {cls.__base__.__name__}")


def _names() -> Iterator[Finding]:
    for path, names in READS.items():
        try:
            cls = pkgutil.resolve_name(path)
        except (ImportError, AttributeError) as error:
            yield Finding(BROKEN, "names", f"{path}: {error}", TAKE_TESTED)
            continue
        gone = [name for name in names if not has(cls, name)]
        if gone:
            yield Finding(BROKEN, "names", f"{path} has no {', '.join(gone)}", TAKE_TESTED)
        else:
            yield Finding(OK, "names", f"{path}: {len(names)} attributes")


def has(cls: type, name: str) -> bool:
    """Whether objects of a class have an attribute: its own, annotated, or assigned to ``self`` in its source."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("sglang.")]
    return hasattr(cls, name) or any(
        name in getattr(base, "__annotations__", {}) or f"self.{name} =" in inspect.getsource(base)
        or f"self.{name}:" in inspect.getsource(base)
        for base in bases
    )  # fmt: skip


def _refusals() -> Iterator[Finding]:
    """A refusal that reads a field SGLang has renamed would refuse nothing."""
    import msgspec
    from sglang.srt.server_args import ServerArgs

    from saw_int4.sglang_plugin import refusals

    fields = {field.name for field in msgspec.structs.fields(ServerArgs)}
    absent = [r.field for r in refusals.REFUSALS if r.field not in fields]
    if absent and sglang_version() not in TESTED_SGLANG:
        text = f"this SGLang has no {', '.join(absent)}, which {KV_CACHE_DTYPE} is refused with"
        yield Finding(
            WARNING, "refusals", text, "look whether they were renamed: then saw_int4 must refuse the new name"
        )
    else:
        yield Finding(
            OK, "refusals", f"{len(refusals.REFUSALS) - len(absent)} flags are refused beside {KV_CACHE_DTYPE}"
        )
    try:
        refusals.check_environment()
    except ValueError as error:
        yield Finding(BROKEN, "environment", str(error), "unset it")
    except AttributeError as error:
        yield Finding(BROKEN, "environment", f"SGLang knows no such variable: {error}", TAKE_TESTED)
