"""SGLang's memory sizing: what the backend's workspaces leave of it, and bytes per token, asked of the row format."""

from __future__ import annotations

import logging

import torch

from saw_int4 import env
from saw_int4.sglang_plugin.names import KV_CACHE_DTYPE

logger = logging.getLogger(__name__)


def token_bytes(num_kv_heads: int, head_dim: int, layers: range) -> int:
    """Bytes of one token in some layers of the model, K and V, on one rank."""
    from saw_int4.sglang_plugin.quant_method import Int4KVMethod

    options = env.published()
    method = Int4KVMethod(options.kv_format(head_dim), [layer in options.bf16_layer_ids for layer in layers])
    return method.compute_cell_size(num_kv_heads, head_dim, len(layers), 1)


def pool_budget(original, self, pre_model_load_memory):
    """AROUND KVCacheConfigurator._profile_available_bytes: on a GPU less what the backend allocates beside the pool.

    SGLang's --mem-fraction-static leaves memory for activations and graphs, of which our workspaces take none then.
    A CPU's memory is not filled to the last byte.
    """
    available = original(self, pre_model_load_memory)
    if self.kv_cache_dtype_str != KV_CACHE_DTYPE or torch.device(self.device).type != "cuda":
        return available
    from saw_int4.sglang_plugin import workspaces

    parts = workspaces.beside_the_pool(self)
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in parts.items() if size)
    logger.info("saw_int4: %.1f MB beside the KV pool, out of its budget: %s", total / 2**20, listed)
    if total >= available:
        raise ValueError(
            f"--kv-cache-dtype int4: {available / 2**20:.1f} MB are left for the KV cache, and its workspaces need "
            f"{total / 2**20:.1f} ({listed}). Way out: raise --mem-fraction-static, or serve fewer requests at once "
            "(--cuda-graph-max-bs-decode)."
        )
    return available - total


def line_room(original):
    """AROUND get_req_to_token_extra_context_len: cells of a request's line of slots past the end of the context.

    With pages of one token SGLang counts the drafts that are verified alone; it reserves twice as many slots as a tree
    has branches and steps, and near the end of the context writes those past the line.
    """
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
    from sglang.srt.runtime_context import get_model, get_spec

    counted = original()
    if get_model().kv_cache_dtype != KV_CACHE_DTYPE or get_spec().speculative_algorithm is None:
        return counted
    return max(counted, get_alloc_reserve_per_decode())


def cell_size(original, self, kvc, num_layers):
    """AROUND DefaultPoolConfigurator._compute_cell_size: bytes of one token in ``num_layers`` layers."""
    if kvc.kv_cache_dtype_str != KV_CACHE_DTYPE:
        return original(self, kvc, num_layers)
    from sglang.srt.runtime_context import get_parallel

    heads = kvc.model_config.get_num_kv_heads(get_parallel().attn_tp_size, get_parallel().attn_dcp_size)
    first = kvc.layer_info.start_layer
    return token_bytes(heads, kvc.model_config.head_dim, range(first, first + num_layers))


def with_draft_model(original, self, kvc):
    """AROUND DefaultPoolConfigurator.__init__: a draft model's layers at their own price, where SGLang takes ours."""
    original(self, kvc)
    if kvc.kv_cache_dtype_str != KV_CACHE_DTYPE or kvc.is_draft_worker:
        return
    layers = kvc.spec_aux_config.eagle_draft_num_layers
    if layers:
        from sglang.srt.runtime_context import get_parallel

        draft = kvc.spec_aux_config.draft_model_config
        heads = draft.get_num_kv_heads(get_parallel().attn_tp_size)
        draft_bytes = heads * (draft.head_dim + draft.v_head_dim) * draft.dtype.itemsize * layers
        self._cell_size = self._compute_cell_size(kvc, kvc.layer_info.num_effective_layers) + draft_bytes


def hybrid_swa(original, self, kvc):
    """AROUND HybridSWAPoolConfigurator.__init__: the same for its full-attention and sliding-window layers."""
    if kvc.kv_cache_dtype_str != KV_CACHE_DTYPE:
        return original(self, kvc)
    from sglang.srt.runtime_context import get_parallel

    if env.published().bf16_layers:
        raise ValueError(
            f"--kv-cache-dtype int4: {env.BF16_LAYERS} is set, and this model has a KV pool of its own for layers with "
            "sliding windows. Way out: add --disable-hybrid-swa-memory, or leave the layers out."
        )
    dtype, kvc.kv_cache_dtype = kvc.kv_cache_dtype, torch.uint8  # torch cannot size uint4; corrected below
    try:
        original(self, kvc)
    finally:
        kvc.kv_cache_dtype = dtype
    tp, model = get_parallel().attn_tp_size, kvc.model_config
    self._full_per_token = token_bytes(model.get_num_kv_heads(tp), model.head_dim, range(1))
    self._swa_per_token = token_bytes(model.get_swa_num_kv_heads(tp), model.swa_head_dim, range(1))
    self._recompute_cell_size()
    return None
