"""HiCache over INT4 rows: SGLang's host pool and file storage take whole rows, codes and parameters together.

Servers refuse HiCache: its transfers are CUDA kernels and were not run. Here a copy in torch stands for them, between
buffers of the geometry that SGLang's classes make of what the pool says of itself.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

from saw_int4 import env
from saw_int4.sglang_plugin.names import sglang_version
from saw_int4.sglang_plugin.pool import Int4KVPool

if sglang_version() == "0.5.21":
    pytest.skip("its host pool asks the device pool for nothing that could be answered", allow_module_level=True)

SIZE, PAGE, LAYERS, HEADS, DIM = 96, 16, 2, 2, 64
DEVICE_PAGES, HOST_PAGES = (1, 4, 5), (3, 0, 2)


def slots(pages) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()


def copy_pages(*, src_layers, dst_layers, src_indices, dst_indices, page_size) -> None:
    """What sgl_kernel's transfer_kv_direct does: pages, layer by layer, from tensors like those they go to."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        assert source.shape[1:] == target.shape[1:] and source.dtype == target.dtype
        target[dst_indices] = source[src_indices]


@pytest.fixture
def pool(monkeypatch) -> Int4KVPool:
    monkeypatch.setenv(env.RESOLVED, env.Options(calibration="none").to_json())
    pool = Int4KVPool(
        SIZE,
        page_size=PAGE,
        dtype=torch.uint4,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    torch.manual_seed(0)
    for layer in range(LAYERS):
        k, v = torch.randn(2, SIZE + PAGE, HEADS, DIM, dtype=torch.bfloat16)
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(torch.arange(len(k))), k, v)
    return pool


def make_host_pool(pool: Int4KVPool, monkeypatch, layout: str):
    from sglang.srt.mem_cache.pool_host import mha

    monkeypatch.setattr(mha, "transfer_kv_direct", copy_pages, raising=False)
    (info,) = pool.get_device_pool_infos()
    info.buffer_info.validate(layer_ids=info.layer_ids)
    return mha.get_mha_host_pool_cls(info.buffer_info)(
        info.buffer_info,
        host_to_device_ratio=1,
        host_size=0,
        page_size=PAGE,
        layout=layout,
        pin_memory=False,
        device_capacity_tokens=SIZE,
        start_layer=0,
        end_layer=LAYERS,
    )


def round_trip(pool: Int4KVPool, host) -> None:
    """Back up three pages, lose the device's rows, load the pages elsewhere."""
    kept = [rows[slots(DEVICE_PAGES)].clone() for rows in (*pool.k_buffer, *pool.v_buffer)]
    host.backup_from_device_all_layer(pool, slots(HOST_PAGES), slots(DEVICE_PAGES), "direct")
    for rows in (*pool.k_buffer, *pool.v_buffer):
        rows.fill_(0xAB)
    elsewhere = slots((2, 0, 6))
    for layer in range(LAYERS):
        host.load_to_device_per_layer(pool, slots(HOST_PAGES), elsewhere, layer, "direct")
    for rows, before in zip((*pool.k_buffer, *pool.v_buffer), kept):
        assert torch.equal(rows[elsewhere], before)


def test_host_tier(pool, monkeypatch):
    host = make_host_pool(pool, monkeypatch, "layer_first")
    assert host.get_size_per_token() == pool.bytes_per_token
    round_trip(pool, host)


def test_geometry_that_sglang_would_assume_is_seen(pool, monkeypatch):
    """Without our description a host row has head_dim bytes: more than the codes, and not where the next head is."""
    monkeypatch.setattr(Int4KVPool, "_mha_buffer_info", MHATokenToKVPool._mha_buffer_info)
    host = make_host_pool(pool, monkeypatch, "layer_first")
    assert host.get_size_per_token() != pool.bytes_per_token
    with pytest.raises(AssertionError):
        round_trip(pool, host)


@pytest.mark.parametrize("layout", ["layer_first", "page_first_direct"])
def test_file_storage(pool, monkeypatch, tmp_path, layout):
    """A page of the host tier, through a file, into another page: whole rows of every layer."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    host = make_host_pool(pool, monkeypatch, layout)
    host.kv_buffer.copy_(torch.randint(256, host.kv_buffer.shape, dtype=torch.uint8))
    ranks = dict.fromkeys(("tp_rank", "pp_rank", "attn_cp_rank"), 0)
    sizes = dict.fromkeys(("tp_size", "pp_size", "attn_cp_size"), 1)
    flags = dict.fromkeys(("is_mla_model", "enable_storage_metrics", "is_page_first_layout"), False)
    storage = HiCacheFile(HiCacheStorageConfig(**ranks, **sizes, **flags, model_name="m"), str(tmp_path))
    page = host.get_data_page(PAGE)
    assert page.numel() == PAGE * pool.bytes_per_token
    assert storage.set("key", page)
    target = host.get_dummy_flat_data_page()
    assert storage.get("key", target) is target
    host.set_from_flat_data_page(3 * PAGE, target)
    assert torch.equal(host.get_data_page(3 * PAGE), page)


def test_layers_of_both_kinds_are_refused(pool):
    pool.quant_method.in_bf16 = [True, False]
    with pytest.raises(NotImplementedError, match="rows of one size only"):
        pool.get_device_pool_infos()
