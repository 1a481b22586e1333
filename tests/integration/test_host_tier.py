"""HiCache over INT4 rows: SGLang's host pool and file storage take whole rows, codes and parameters together.

On a GPU the transfers are SGLang's CUDA kernels. Copies for page_first_direct failed there (an H200,
cudaMemcpyBatchAsync: invalid argument; kernels of sgl-kernel 0.4.5, older than this SGLang wants), and are refused.
"""

from __future__ import annotations

from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import qwen3
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

from saw_int4 import env
from saw_int4.format import PARAM_BYTES
from saw_int4.sglang_plugin import cpu_transfers, transfers
from saw_int4.sglang_plugin.names import sglang_version
from saw_int4.sglang_plugin.pool import Int4KVPool

if sglang_version() == "0.5.21":
    pytest.skip("its host pool asks the device pool for nothing that could be answered", allow_module_level=True)

SIZE, PAGE, LAYERS, HEADS, DIM = 96, 16, 2, 2, 64
LAYOUTS = ["layer_first", "page_first_direct"]
DEVICE_PAGES, HOST_PAGES = (1, 4, 5), (3, 0, 2)


def slots(pages) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()


def make_pool(monkeypatch, device="cpu", heads=HEADS, dim=DIM, **options) -> Int4KVPool:
    monkeypatch.setenv(env.RESOLVED, env.Options(**{"calibration": "none", **options}).to_json())
    return Int4KVPool(
        SIZE,
        page_size=PAGE,
        dtype=torch.uint4,
        head_num=heads,
        head_dim=dim,
        layer_num=LAYERS,
        device=device,
        enable_memory_saver=False,
    )


def fill(pool: Int4KVPool) -> Int4KVPool:
    torch.manual_seed(0)
    for layer in range(LAYERS):
        k, v = torch.randn(2, SIZE + PAGE, pool.head_num, pool.head_dim, dtype=torch.bfloat16, device=pool.device)
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(torch.arange(len(k), device=k.device)), k, v)
    return pool


@pytest.fixture
def pool(monkeypatch) -> Int4KVPool:
    return fill(make_pool(monkeypatch))


def make_host_pool(pool: Int4KVPool, monkeypatch, layout: str):
    from sglang.srt.mem_cache.pool_host import base, mha

    # A few pages are always to be had; SGLang leaves 10 GiB of the machine alone, which other tests may be using.
    monkeypatch.setattr(base, "host_memory_budget_bytes", lambda requested_bytes: requested_bytes)
    on_cpu = pool.device == "cpu"
    for name in cpu_transfers.HOST_TRANSFERS if on_cpu else ():
        monkeypatch.setattr(mha, name, getattr(cpu_transfers, name), raising=False)
    (info,) = pool.get_device_pool_infos()
    info.buffer_info.validate(layer_ids=info.layer_ids)
    return mha.get_mha_host_pool_cls(info.buffer_info)(
        info.buffer_info,
        host_to_device_ratio=1,
        host_size=0,
        page_size=PAGE,
        layout=layout,
        pin_memory=not on_cpu,
        device_capacity_tokens=SIZE,
        start_layer=0,
        end_layer=LAYERS,
    )


def round_trip(pool: Int4KVPool, host, io_backend="direct") -> None:
    """Back up three pages, lose the device's rows, load the pages elsewhere."""
    where = pool.device if io_backend == "kernel" else "cpu"
    kept = [rows[slots(DEVICE_PAGES)].clone() for rows in (*pool.k_buffer, *pool.v_buffer)]
    on_host, on_device, elsewhere = (slots(pages).to(where) for pages in (HOST_PAGES, DEVICE_PAGES, (2, 0, 6)))
    staged = host.can_use_write_back_jit  # which takes the host's indices on the host
    host.backup_from_device_all_layer(pool, on_host.cpu() if staged else on_host, on_device, io_backend)
    for rows in (*pool.k_buffer, *pool.v_buffer):
        rows.fill_(0xAB)
    for layer in range(LAYERS):
        host.load_to_device_per_layer(pool, on_host, elsewhere, layer, io_backend)
    for rows, before in zip((*pool.k_buffer, *pool.v_buffer), kept):
        assert torch.equal(rows[elsewhere], before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_host_tier(pool, monkeypatch, layout):
    host = make_host_pool(pool, monkeypatch, layout)
    assert host.get_size_per_token() == pool.bytes_per_token
    round_trip(pool, host)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (8, 128), (4, 256)])
@pytest.mark.parametrize(
    ("io_backend", "layout"),
    [("kernel", "layer_first"), ("kernel", "page_first"), ("direct", "layer_first")],
)
def test_host_tier_of_a_gpu(monkeypatch, heads, dim, io_backend, layout):
    """SGLang's own transfers."""
    pool = fill(make_pool(monkeypatch, "cuda", heads, dim))
    host = make_host_pool(pool, monkeypatch, layout)
    try:
        round_trip(pool, host, io_backend)
    finally:
        torch.cuda.synchronize()
        host.destroy()  # its memory is registered with the driver, under an address that comes back


def test_a_transfer_that_leaves_parameters_behind_is_seen(pool, monkeypatch):
    def codes_only(*, src_layers, dst_layers, src_indices, dst_indices, page_size):
        for source, target in zip(src_layers, dst_layers):
            target[dst_indices, :, :-PARAM_BYTES] = source[src_indices, :, :-PARAM_BYTES]

    monkeypatch.setattr(cpu_transfers, "transfer_kv_direct", codes_only)
    host = make_host_pool(pool, monkeypatch, "layer_first")
    with pytest.raises(AssertionError):
        round_trip(pool, host)


def test_geometry_that_sglang_would_assume_is_seen(pool, monkeypatch):
    """Without our description a host row has head_dim bytes: more than the codes, and not where the next head is."""
    monkeypatch.setattr(Int4KVPool, "_mha_buffer_info", MHATokenToKVPool._mha_buffer_info)
    host = make_host_pool(pool, monkeypatch, "layer_first")
    assert host.get_size_per_token() != pool.bytes_per_token
    with pytest.raises(RuntimeError, match="shape mismatch"):
        round_trip(pool, host)


def make_storage(folder, model_name: str):
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    ranks = dict.fromkeys(("tp_rank", "pp_rank", "attn_cp_rank"), 0)
    sizes = dict.fromkeys(("tp_size", "pp_size", "attn_cp_size"), 1)
    flags = dict.fromkeys(("is_mla_model", "enable_storage_metrics", "is_page_first_layout"), False)
    return HiCacheFile(HiCacheStorageConfig(**ranks, **sizes, **flags, model_name=model_name), str(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_file_storage(pool, monkeypatch, tmp_path, layout):
    """A page of the host tier, through a file, into another page: whole rows of every layer."""
    host = make_host_pool(pool, monkeypatch, layout)
    host.kv_buffer.copy_(torch.randint(256, host.kv_buffer.shape, dtype=torch.uint8))
    storage = make_storage(tmp_path, "m")
    page = host.get_data_page(PAGE)
    assert page.numel() == PAGE * pool.bytes_per_token
    assert storage.set("key", page)
    target = host.get_dummy_flat_data_page()
    assert storage.get("key", target) is target
    host.set_from_flat_data_page(3 * PAGE, target)
    assert torch.equal(host.get_data_page(3 * PAGE), page)


def name_of(pool, model_path, layout="page_first", overrides="{}", served_as="m") -> str:
    """The name that SGLang's storage backends put into their keys."""
    controller = SimpleNamespace(
        mem_pool_device=pool, mem_pool_host=SimpleNamespace(layout=layout), storage_backend_type="file"
    )
    model = SimpleNamespace(model_path=str(model_path), json_model_override_args=overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sglang.srt.runtime_context.get_model", lambda: model)
        config = transfers.storage_config(lambda self: make_config(served_as), controller)
    return config.model_name


def make_config(model_name: str):
    return make_dataclass("Config", ["model_name"])(model_name)


def test_storage_of_another_format_transform_or_model_is_not_read(model, monkeypatch, tmp_path):
    """Each name is another, stays the same across pools and copies, and a page under one is not found under others."""
    tiny = qwen3(model, tmp_path / "tiny")
    ours = name_of(make_pool(monkeypatch), tiny)
    assert ours == name_of(make_pool(monkeypatch), tiny)
    assert ours.startswith("m-int4-")
    rotated = name_of(make_pool(monkeypatch, rotation="kv"), tiny)
    unrotated = name_of(make_pool(monkeypatch, rotation="none"), tiny)
    calibrated = make_pool(monkeypatch)
    calibrated.quant_method.format = replace(calibrated.format, calibration="0123456789abcdef")
    others = [
        rotated,
        unrotated,
        name_of(calibrated, tiny),
        name_of(make_pool(monkeypatch), model),
        name_of(make_pool(monkeypatch), tiny, layout="page_first_direct"),
        name_of(make_pool(monkeypatch), tiny, overrides='{"rope_theta": 5}'),
    ]
    assert len({ours, *others}) == 7
    storage = make_storage(tmp_path, ours)
    assert storage.set("key", torch.zeros(8, dtype=torch.uint8))
    assert storage.exists("key")
    assert not any(make_storage(tmp_path, other).exists("key") for other in others)


def test_storage_of_other_caches_keeps_its_name(model):
    plain = MHATokenToKVPool(
        SIZE, page_size=PAGE, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM, layer_num=1, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    assert name_of(plain, model) == "m"


def test_other_storage_backends_are_refused_when_they_are_attached(pool):
    controller = SimpleNamespace(mem_pool_device=pool, storage_backend_type="mooncake")
    with pytest.raises(ValueError, match="expected file"):
        transfers.storage_config(lambda self: make_config("m"), controller)


def test_weights_without_a_checkpoint_are_not_stored(pool, monkeypatch):
    """Storage attached after an update knows the first checkpoint only, unless SGLang loaded another one from disk."""

    def begin_weight_update(self, request):
        return "begun"

    def update_weights_from_disk(self, request):
        return "updated"

    monkeypatch.setattr(transfers, "_weights_named", True)
    args = SimpleNamespace(kv_cache_dtype="int4")
    manager = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=None, server_args=args))
    controller = SimpleNamespace(mem_pool_device=pool, storage_backend_type="file")
    assert transfers.update_weights(begin_weight_update, manager, None) == "begun"
    with pytest.raises(ValueError, match="got other weights while it ran"):
        transfers.storage_config(lambda self: make_config("m"), controller)
    assert transfers.update_weights(update_weights_from_disk, manager, None) == "updated"
    assert transfers._weights_named


def test_layers_of_both_kinds_are_refused(pool):
    pool.quant_method.in_bf16 = [True, False]
    with pytest.raises(NotImplementedError, match="rows of one size only"):
        pool.get_device_pool_infos()
