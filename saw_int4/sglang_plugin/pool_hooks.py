"""Wrappers that make SGLang build INT4 pools. Each passes through when the cache is another one."""

from __future__ import annotations

import torch

from saw_int4.sglang_plugin.names import ATTENTION_BACKEND, KV_CACHE_DTYPE


def configure_kv_cache_dtype(original, *args, **kwargs):
    """``int4`` becomes (None, torch.uint4).

    Nothing in SGLang matches torch.uint4, and torch neither sizes it nor converts to it: a path we do not know of
    raises, where uint8 would silently store garbage. A draft model's cache is in the model's own dtype.
    """
    if kwargs.get("server_args_kv_cache_dtype") != KV_CACHE_DTYPE:
        return original(*args, **kwargs)
    if kwargs["is_draft_worker"]:
        return "auto", kwargs["model_dtype"]
    return None, torch.uint4


def build_pool(original, self, **kwargs):
    """AROUND the KVCacheConfigurator methods that take the multi-head pool class."""
    if self.kv_cache_dtype_str != KV_CACHE_DTYPE:
        return original(self, **kwargs)
    from saw_int4.sglang_plugin.pool import Int4KVPool, name_layers

    kv_pool = original(self, **{**kwargs, "mha_pool_class": Int4KVPool})
    name_layers(kv_pool)
    return kv_pool


def build_oot_pool(original, self, *, max_total_num_tokens):
    """SGLang 0.5.21 on an out-of-tree platform: take the ordinary way instead of the platform's pool class."""
    if self.kv_cache_dtype_str != KV_CACHE_DTYPE:
        return original(self, max_total_num_tokens=max_total_num_tokens)
    if self.is_hybrid_swa:
        raise ValueError(
            "--kv-cache-dtype int4: SGLang 0.5.21 builds no sliding-window pool on an out-of-tree platform. "
            "Way out: add --disable-hybrid-swa-memory."
        )
    from saw_int4.sglang_plugin.pool import Int4KVPool

    return self._build_mha_kv_pool(max_total_num_tokens=max_total_num_tokens, mha_pool_class=Int4KVPool)


def support_triton(original, backend):
    """SGLang 0.5.21 decides by the backend's name alone, and takes Triton for names it does not know."""
    if backend != ATTENTION_BACKEND:
        return original(backend)
    return torch.cuda.is_available()
