"""Transfers of KV on the CPU platform: the few steps for which SGLang has CUDA only, in torch.

A host pool of layout ``layer_first`` lies as on the device, one of ``page_first_direct`` is [pages, layers, page, ...].
"""

from __future__ import annotations

import torch
from torch import Tensor

# What SGLang's host pools call, by the names under which they import it where there is CUDA.
HOST_TRANSFERS = (
    "transfer_kv_direct",
    "transfer_kv_all_layer_direct_lf_pf",
    "transfer_kv_per_layer_direct_pf_lf",
)


def install() -> None:
    """Give SGLang the functions below, where this server has a host tier or another server to send to."""
    from sglang.srt.runtime_context import get_disagg, get_memory

    disaggregated = get_disagg().disaggregation_mode != "null"
    if get_memory().enable_hierarchical_cache or disaggregated:
        _host_pools()
    if disaggregated:
        _senders()


def _host_pools() -> None:
    from sglang.srt.mem_cache.pool_host import base, mha

    construct = base.HostKVCache.__init__
    base.HostKVCache.__init__ = lambda self, **kwargs: construct(self, **{**kwargs, "pin_memory": False})
    for name in HOST_TRANSFERS:
        setattr(mha, name, globals()[name])


def _senders() -> None:
    """Two optimisations that wait for a CUDA event are off."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender
    from sglang.srt.environ import envs

    MooncakeKVSender.supports_host_tensor_indices = False
    envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.set(False)


def transfer_kv_direct(*, src_layers, dst_layers, src_indices, dst_indices, page_size) -> None:
    """Tokens of each tensor to the tensor in the same place of the other list."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_all_layer_direct_lf_pf(*, src_ptrs, dst_ptrs, src_indices, dst_indices, page_size) -> None:
    """Device layers, K's then V's, to host pages of K and of V."""
    layers = len(src_ptrs) // 2
    pages, offsets = _places(dst_indices, page_size)
    for host, device in zip(dst_ptrs, (src_ptrs[:layers], src_ptrs[layers:]), strict=True):
        for layer, source in enumerate(device):
            host[pages, layer, offsets] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(*, src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size) -> None:
    """One layer of the host pages of K and of V to the device."""
    pages, offsets = _places(src_indices, page_size)
    for host, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = host[pages, layer_id, offsets]


def _places(slots: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    return torch.div(slots, page_size, rounding_mode="floor"), slots % page_size
