"""Bytes per token for SGLang's memory sizing: asked of the row format, exact by construction."""

from __future__ import annotations

import torch

from saw_int4 import env
from saw_int4.sglang_plugin.names import KV_CACHE_DTYPE


def layer_token_bytes(num_kv_heads: int, head_dim: int) -> int:
    """Bytes of one token in one layer, K and V, on one rank."""
    from saw_int4.sglang_plugin.quant_method import Int4KVMethod

    return Int4KVMethod(env.published().kv_format(head_dim)).compute_cell_size(num_kv_heads, head_dim, 1, 1)


def cell_size(original, self, kvc, num_layers):
    """AROUND DefaultPoolConfigurator._compute_cell_size: bytes of one token in ``num_layers`` layers."""
    if kvc.kv_cache_dtype_str != KV_CACHE_DTYPE:
        return original(self, kvc, num_layers)
    from sglang.srt.runtime_context import get_parallel

    heads = kvc.model_config.get_num_kv_heads(get_parallel().attn_tp_size, get_parallel().attn_dcp_size)
    return num_layers * layer_token_bytes(heads, kvc.model_config.head_dim)


def hybrid_swa(original, self, kvc):
    """AROUND HybridSWAPoolConfigurator.__init__: the same for its full-attention and sliding-window layers."""
    if kvc.kv_cache_dtype_str != KV_CACHE_DTYPE:
        return original(self, kvc)
    from sglang.srt.runtime_context import get_parallel

    dtype, kvc.kv_cache_dtype = kvc.kv_cache_dtype, torch.uint8  # torch cannot size uint4; corrected below
    try:
        original(self, kvc)
    finally:
        kvc.kv_cache_dtype = dtype
    tp, model = get_parallel().attn_tp_size, kvc.model_config
    self._full_per_token = layer_token_bytes(model.get_num_kv_heads(tp), model.head_dim)
    self._swa_per_token = layer_token_bytes(model.get_swa_num_kv_heads(tp), model.swa_head_dim)
    self._recompute_cell_size()
    return None
