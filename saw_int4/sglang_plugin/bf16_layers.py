"""Attention of layers that stay in BF16: a backend of SGLang's beside ours."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from saw_int4.sglang_plugin.pool import pools_of


def backend_for(model_runner) -> AttentionBackend:
    """SGLang's own attention over the numbers of such layers, which is told of every pass; where none is, one that does
    nothing."""
    pool = model_runner.token_to_kv_pool
    if not any(any(part.quant_method.in_bf16) for part in pools_of(pool)):
        return _NoLayers()
    if torch.device(pool.device).type != "cuda":
        return TorchNativeAttnBackend(model_runner)
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    backend = TritonAttnBackend(model_runner)
    backend.v_head_dim = model_runner.model_config.v_head_dim  # it took that of the first layer's rows
    return backend


class _NoLayers(AttentionBackend):
    """Where none stays in BF16: nothing to prepare."""

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        pass

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pass
