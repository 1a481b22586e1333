"""Our launcher with measuring points for the tests, in every process of the server.

SGLang spawns its processes from this script, so that the hooks registered here reach them too. Controlled by:

    SAW_TEST_CACHE_BYTES   what SGLang's memory profiling reports as free for the KV cache, and for host pools tenfold
    SAW_TEST_FAULT         path of a file; while it holds "wrong_slot" or "lost_scale", rows are damaged that way
"""

import hashlib
import os
from pathlib import Path

from saw_int4 import launch_server

launch_server.choose_platform()

from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: E402

CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
written: list[tuple[int, int, str]] = []  # layer, tokens, hash of their rows, for each call since the last look


def available_bytes(original, self, *args, **kwargs):
    return int(os.environ["SAW_TEST_CACHE_BYTES"])


def host_bytes(original, *args, **kwargs):
    """SGLang leaves 10 GiB of a machine alone, which a small one may not have."""
    return 10 * int(os.environ["SAW_TEST_CACHE_BYTES"])


def planted_fault() -> str:
    path = Path(os.environ.get("SAW_TEST_FAULT", "/nonexistent"))
    return path.read_text().strip() if path.exists() else ""


def store(original, self, layer_id, global_layer_id, loc, cache_k, cache_v, *args, **kwargs):
    fault = planted_fault()
    if fault == "wrong_slot" and len(loc) > 1:
        loc = loc.clone()
        loc[[0, -1]] = loc[[-1, 0]]
    original(self, layer_id, global_layer_id, loc, cache_k, cache_v, *args, **kwargs)
    k, v = self.rows(layer_id - self.start_layer)
    if fault == "lost_scale":
        k[loc[::4], :, -4:] = 0  # as a copy that forgets them would
    if layer_id in (self.start_layer, self.start_layer + self.layer_num - 1):
        digest = hashlib.sha256(k[loc].numpy().tobytes() + v[loc].numpy().tobytes()).hexdigest()
        written.append((layer_id, len(loc), digest))


def internal_state(original, self, request):
    result = original(self, request)
    result.internal_state["test_written"] = list(written)
    written.clear()
    result.internal_state["test_free_tokens"] = int(self.token_to_kv_pool_allocator.available_size())
    return result


def store_hook() -> None:
    """The pool's class cannot be hooked before sglang is up: SGLang resolves this target when it applies hooks."""
    target = "saw_int4.sglang_plugin.pool.Int4KVPool._set_quantized_kv_buffer"
    HookRegistry.register(target, store, HookType.AROUND)


if "SAW_TEST_CACHE_BYTES" in os.environ:
    HookRegistry.register(f"{CONFIGURATOR}._profile_available_bytes", available_bytes, HookType.AROUND)
    target = "sglang.srt.mem_cache.pool_host.base.host_memory_budget_bytes"
    HookRegistry.register(target, host_bytes, HookType.AROUND)
HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", internal_state, HookType.AROUND)
store_hook()

if __name__ == "__main__":
    launch_server.main()
