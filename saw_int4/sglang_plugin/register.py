"""Puts the plugin into SGLang: one table of every seam, applied through SGLang's own extension points.

SGLang logs a plugin's failure and carries on without it. A failure here is therefore remembered and raised, by
``verify``, as soon as somebody asks for the INT4 cache; servers with another cache are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from saw_int4.sglang_plugin.names import ATTENTION_BACKEND, sglang_version

logger = logging.getLogger(__name__)

HELD = ("patched", "hooked")  # see seams()

_failures: list[str] = []
_done = False


def register_all() -> None:
    """Register every seam once. Called in each SGLang process before it reads its arguments."""
    global _done
    if _done:
        return
    _done = True
    attempt(_register)


def attempt(action: Callable):
    """The action's result; None when it fails, and then INT4 is refused for that reason."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001  (whatever it was, int4 must refuse to start because of it)
        logger.exception("saw_int4: set-up failed; --kv-cache-dtype int4 will be refused")
        _failures.append(f"{type(error).__name__}: {error}")
        return None


def failures() -> list[str]:
    """Why INT4 is not in place, one sentence each; empty when every seam is hooked, or patched into SGLang."""
    from saw_int4.sglang_plugin import verify

    if not (_done or _failures):  # no plugin here: SGLang's own source must hold the seams
        attempt(verify.tested_version)
    found = {} if _failures else attempt(seams) or {}
    return _failures + [f"the seam on SGLang's {target} is {how}" for target, how in found.items() if how not in HELD]


def seams() -> dict[str, str]:
    """Every function that the plugin wraps: "patched" in SGLang's source, "hooked" by its plugin loader, or a fault."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from saw_int4.sglang_plugin import native

    hows = {(True, False): "patched", (False, True): "hooked", (False, False): "missing", (True, True): "there twice"}
    return {target: hows[native.is_seam(target), target in HookRegistry._patched] for target in hooks()}


def hooks() -> dict[str, Callable]:
    """Every function of SGLang that the plugin wraps, with its wrapper ``(original, *args, **kwargs)``."""
    from saw_int4.sglang_plugin import pool_hooks, report, sizing, transfers, verify

    configurator = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
    sizes = "sglang.srt.model_executor.pool_configurator"
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    table = {
        "sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype": pool_hooks.configure_kv_cache_dtype,
        f"{configurator}._build_mha_kv_pool": pool_hooks.build_pool,
        f"{configurator}._build_hybrid_swa_kv_pool": pool_hooks.build_pool,
        f"{configurator}._profile_available_bytes": sizing.pool_budget,
        "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len": sizing.line_room,
        f"{sizes}.DefaultPoolConfigurator._compute_cell_size": sizing.cell_size,
        f"{sizes}.HybridSWAPoolConfigurator.__init__": sizing.hybrid_swa,
        f"{scheduler}.__init__": verify.scheduler_init,
        f"{scheduler}.get_internal_state": report.internal_state,
    }
    if sglang_version() == "0.5.21":  # its out-of-tree platforms bypass the ordinary pool and allocator paths
        table[f"{configurator}._build_oot_mha_kv_pool"] = pool_hooks.build_oot_pool
        table["sglang.srt.utils.common.support_triton"] = pool_hooks.support_triton
    else:  # 0.5.21 is refused with draft models, with HiCache, and with prefill and decode on two servers
        table[f"{sizes}.DefaultPoolConfigurator.__init__"] = sizing.with_draft_model
        table["sglang.srt.managers.cache_controller.HiCacheController._generate_storage_config"] = (
            transfers.storage_config
        )
        table["sglang.srt.disaggregation.utils.get_pd_kv_layout"] = transfers.pd_kv_layout
        updater = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        table |= {f"{updater}.{method}": transfers.update_weights for method in transfers.WEIGHT_UPDATES}
    return table


def _register() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from saw_int4.sglang_plugin import native, server_args, verify

    server_args.register_hooks()  # first: it carries the refusal of everything that fails below
    verify.tested_version()
    server_args.extend_choices()
    for target, wrapper in hooks().items():
        verify.target_exists(target)
        if not native.is_seam(target):
            HookRegistry.register(target, wrapper, HookType.AROUND)
    if ATTENTION_BACKEND not in ATTENTION_BACKENDS:
        register_attention_backend(ATTENTION_BACKEND)(make_backend)


def make_backend(model_runner):
    """The attention backend's factory, as SGLang's registry calls it."""
    from saw_int4.sglang_plugin.backend import Int4AttentionBackend

    return Int4AttentionBackend(model_runner)
