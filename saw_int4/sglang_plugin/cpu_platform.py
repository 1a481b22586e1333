"""SGLang on plain CPU, as an out-of-tree platform: torch is all it needs.

SGLang's own CPU platform needs the CUDA-only or AMX kernels package. This one is active only where
``activate_cpu_platform`` was told so. It serves any --kv-cache-dtype; INT4 is one of them.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformEnum, SRTPlatform

from saw_int4.sglang_plugin.names import NGRAM, WITH_DRAFT_MODEL, sglang_version


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU as SGLang sees an unknown accelerator: no Triton, no graphs, torch-native attention."""

    _enum = PlatformEnum.OOT

    def get_device(self, *args, **kwargs) -> str:
        return "cpu"  # a name, as SGLang takes it from every other platform; the mixin returns a torch.device

    def is_pin_memory_available(self, device=None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def post_load_model(self, model) -> None:
        from saw_int4.sglang_plugin import cpu_transfers

        cpu_transfers.install()

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        known = (NGRAM, *WITH_DRAFT_MODEL)
        return algorithm in known and sglang_version() != "0.5.21"  # which does not ask for a worker below

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        from saw_int4.sglang_plugin import cpu_speculation

        return cpu_speculation.worker_class(algorithm)

    def get_speculative_cache_locs_fn(self) -> Callable:
        from saw_int4.sglang_plugin import cpu_speculation

        return cpu_speculation.draft_slots

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        from saw_int4.sglang_plugin.pool import CpuKVPool

        return CpuKVPool if kind == "mha" else None

    if sglang_version() == "0.5.21":  # later versions take their own classes where a platform names none

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            from saw_int4.sglang_plugin.paged_allocator import TorchPagedAllocator

            return TorchPagedAllocator
