"""The KV pool of INT4 rows. A slot's row holds its parameters, so that whatever moves slots moves them too."""

from __future__ import annotations

from functools import cached_property

import msgspec
import torch
from sglang.srt.mem_cache.memory_pool import KvBufferDesc, MHATokenToKVPool, unwrap_write_loc

from saw_int4 import env, ops
from saw_int4.format import KVFormat
from saw_int4.sglang_plugin.quant_method import Int4KVMethod
from saw_int4.sglang_plugin.transform import KeyTransform


class Int4KVPool(MHATokenToKVPool):
    """SGLang's multi-head KV pool over INT4 rows: ``k_buffer[layer]``, ``v_buffer[layer]`` uint8 [slots, H_kv, row].

    Rows of a layer that stays in BF16 are the bytes of its numbers, moved like all others; its getters return numbers.
    The format comes from the options that the server's parent published, and is carried by ``quant_method``.
    """

    def __init__(
        self,
        *args,
        head_dim,
        layer_num,
        start_layer=None,
        v_head_dim=None,
        quant_method=None,
        post_capture_active=False,
        **kwargs,
    ):
        if v_head_dim not in (None, head_dim):
            raise ValueError(f"int4 KV cache: K head_dim {head_dim} and V head_dim {v_head_dim} differ.")
        if quant_method is not None or post_capture_active:
            raise ValueError("int4 KV cache: another quantization method, or post-capture sizing, is active.")
        options, first = env.published(), start_layer or 0
        self.layer_ids = list(range(first, first + layer_num))  # in the model
        method = Int4KVMethod(options.kv_format(head_dim), [i in options.bf16_layer_ids for i in self.layer_ids])
        super().__init__(
            *args, head_dim=head_dim, layer_num=layer_num, start_layer=start_layer, quant_method=method, **kwargs
        )

    @property
    def format(self) -> KVFormat:
        """What this pool's bytes mean."""
        return self.quant_method.format

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all of this pool's layers."""
        return self.quant_method.compute_cell_size(self.head_num, self.head_dim, self.layer_num, 1)

    @cached_property
    def transforms(self) -> list[KeyTransform]:
        """The key transform of each of this pool's layers, with this rank's KV heads."""
        calibration = env.published().load_calibration()
        if calibration is None:
            return [KeyTransform()] * self.layer_num
        from sglang.srt.runtime_context import get_parallel

        rank, size = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
        return [KeyTransform.of(calibration.rank(i, rank, size), self) for i in self.layer_ids]

    def rows(self, local_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V rows of one of this pool's layers, uint8 [slots, H_kv, row_bytes]."""
        return self.k_buffer[local_layer], self.v_buffer[local_layer]

    def in_bf16(self, local_layer: int) -> bool:
        """Whether one of this pool's layers stays in BF16."""
        return self.quant_method.in_bf16[local_layer]

    def _get_key_buffer(self, layer_id: int) -> torch.Tensor:
        local = layer_id - self.start_layer
        return self.k_buffer[local].view(torch.bfloat16) if self.in_bf16(local) else super()._get_key_buffer(layer_id)

    def _get_value_buffer(self, layer_id: int) -> torch.Tensor:
        local = layer_id - self.start_layer
        return self.v_buffer[local].view(torch.bfloat16) if self.in_bf16(local) else super()._get_value_buffer(layer_id)

    def _set_quantized_kv_buffer(
        self, layer_id, global_layer_id, loc_info, cache_k, cache_v, k_scale=None, v_scale=None
    ) -> None:
        loc, _, _ = unwrap_write_loc(loc_info)
        local = layer_id - self.start_layer
        shape = (-1, self.head_num, self.head_dim)
        cache_k, cache_v = cache_k.view(shape), cache_v.view(shape)
        if self.in_bf16(local):
            for rows, new in zip(self.rows(local), (cache_k, cache_v)):
                rows.view(torch.bfloat16)[loc] = new
            return
        transform = self.transforms[local]
        ops.append_kv(
            cache_k,
            cache_v,
            *self.rows(local),
            loc,
            rotation_order=self.format.rotation_order,
            rotate_v=self.format.rotate_v,
            k_mean=transform.mean,
            k_inv_scale=transform.inv_scale,
            k_sign=transform.sign,
        )

    def _build_kv_buffer_descs(self) -> list[KvBufferDesc]:
        """Of every buffer, in order K and V; SGLang's describe all as the first layer's. Read by transfers."""
        buffers = [(name, i, rows) for name in "kv" for i, rows in enumerate(getattr(self, f"{name}_buffer"))]
        return [
            KvBufferDesc(f"{name}{i}", rows.shape, row_bytes=rows[0].numel(), tokens_per_row=1)
            for name, i, rows in buffers
        ]

    def _mha_buffer_info(self):
        """What HiCache's host tier and storage allocate and copy (SGLang 0.5.23): whole rows, as bytes."""
        if any(self.quant_method.in_bf16):
            raise NotImplementedError(
                "int4 KV cache: SGLang's host tier has rows of one size only; layers are in BF16."
            )
        row = {"head_dim": self.format.row_bytes, "v_head_dim": self.format.row_bytes}
        return msgspec.structs.replace(super()._mha_buffer_info(), head_num=self.head_num, **row)

    def set_kv_buffer_prefix_valid(self, *args, **kwargs) -> None:
        raise NotImplementedError("int4 KV cache: block-draft speculation (DFLASH) writes past the INT4 rows.")

    def _init_kv_copy_and_warmup(self) -> None:
        if torch.device(self.device).type == "cpu":
            _move_by_torch(self)
        else:
            super()._init_kv_copy_and_warmup()


class CpuKVPool(MHATokenToKVPool):
    """SGLang's 16-bit pool on the CPU platform: of draft models, and of servers without INT4."""

    def _init_kv_copy_and_warmup(self) -> None:
        _move_by_torch(self)


def _move_by_torch(pool: MHATokenToKVPool) -> None:
    """SGLang moves slots with a Triton kernel otherwise."""
    pool.use_native_move_kv_cache = True
    pool._kv_copy_config = None


def locate(kv_pool, layer_id: int) -> tuple[Int4KVPool, int, bool]:
    """The pool that holds a layer of the model, the layer's index in it, and whether its slots are sliding-window ones.

    A sliding-window pool has slots of its own; ``translate_loc_from_full_to_swa`` leads there.
    """
    if not hasattr(kv_pool, "layers_mapping"):
        return kv_pool, layer_id - kv_pool.start_layer, False
    local, is_swa = kv_pool.layers_mapping[layer_id]
    return (kv_pool.swa_kv_pool if is_swa else kv_pool.full_kv_pool), local, is_swa


def name_layers(kv_pool) -> None:
    """Tell the two parts of a pool with sliding-window layers which layers of the model they hold."""
    for layer_id, (local, is_swa) in getattr(kv_pool, "layers_mapping", {}).items():
        (kv_pool.swa_kv_pool if is_swa else kv_pool.full_kv_pool).layer_ids[local] = layer_id


def pools_of(kv_pool) -> list:
    """The pools of layers inside a KV pool: itself, or the two parts of one with sliding-window layers."""
    parts = [getattr(kv_pool, name, None) for name in ("full_kv_pool", "swa_kv_pool")]
    return [part for part in parts if part is not None and part.layer_num] or [kv_pool]
