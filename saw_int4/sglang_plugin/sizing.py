"""Bytes per token for SGLang's memory sizing: asked of the row format, exact by construction."""

from __future__ import annotations

import torch

from saw_int4 import env
from saw_int4.sglang_plugin.names import KV_CACHE_DTYPE


def token_bytes(num_kv_heads: int, head_dim: int, layers: range) -> int:
    """Bytes of one token in some layers of the model, K and V, on one rank."""
    from saw_int4.sglang_plugin.quant_method import Int4KVMethod

    options = env.published()
    method = Int4KVMethod(options.kv_format(head_dim), [layer in options.bf16_layer_ids for layer in layers])
    return method.compute_cell_size(num_kv_heads, head_dim, len(layers), 1)


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
