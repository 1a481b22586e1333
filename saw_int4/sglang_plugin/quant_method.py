"""SGLang's KV quantization strategy for INT4 rows: what buffers a pool allocates. The pool itself stores."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import KVCacheQuantMethodBase

from saw_int4.format import KVFormat
from saw_int4.sglang_plugin.names import KV_CACHE_DTYPE


class Int4KVMethod(KVCacheQuantMethodBase):
    """Allocates one uint8 tensor ``[slots, H_kv, row_bytes]`` per layer for K and one for V; parameters lie inside.

    It declares no way in which SGLang's own backends could read the rows. A layer that stays in BF16 has rows of as
    many bytes as its numbers.
    """

    name = KV_CACHE_DTYPE

    def __init__(self, kv_format: KVFormat, in_bf16: list[bool]) -> None:
        """``in_bf16``: for each layer of the pool, whether it stays in BF16."""
        self.format = kv_format
        self.in_bf16 = in_bf16

    def row_bytes(self, layer: int) -> int:
        """Bytes of one (token, KV head) of K in a layer of the pool, and again of V."""
        return 2 * self.format.head_dim if self.in_bf16[layer] else self.format.row_bytes

    def attention_accesses(self) -> tuple:
        return ()

    def create_buffers(self, size: int, head_num: int, head_dim: int, layer_num: int, device: str) -> dict:
        if head_dim != self.format.head_dim:
            raise ValueError(f"int4 KV cache: the pool has head_dim {head_dim}, the format [{self.format.describe()}].")

        def rows() -> list[torch.Tensor]:
            shapes = [(size, head_num, self.row_bytes(layer)) for layer in range(layer_num)]
            return [torch.zeros(shape, dtype=torch.uint8, device=device) for shape in shapes]

        return {"k_buffer": rows(), "v_buffer": rows(), "store_dtype": torch.uint8}

    def compute_cell_size(self, head_num: int, head_dim: int, num_layers: int, kv_size: int) -> int:
        """Bytes of one token in the first ``num_layers`` layers of the pool, on one rank."""
        return 2 * head_num * sum(self.row_bytes(layer) for layer in range(num_layers))

    def quantize_and_store(self, *args, **kwargs) -> None:
        raise NotImplementedError("int4 KV cache: rows are written by Int4KVPool, which knows the layer's transform.")

    def dequantize_prev_kv(self, *args, **kwargs) -> None:
        raise NotImplementedError("int4 KV cache: rows are read by the saw_int4 attention backend only.")
