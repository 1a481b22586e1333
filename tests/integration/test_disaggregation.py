"""Prefill and decode on two servers: SGLang's own classes send INT4 rows, and compare formats before they do."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PAGE
from server import free_port
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.plugins import load_plugins

from saw_int4 import env
from saw_int4.format import PARAM_BYTES
from saw_int4.sglang_plugin.names import sglang_version
from saw_int4.sglang_plugin.pool import Int4KVPool

if sglang_version() == "0.5.21":
    pytest.skip("it does not compare the formats of two servers' pools: int4 is refused", allow_module_level=True)

LAYERS, HEADS, DIM, SIZE = 2, 4, 64, 96


def make_pool(monkeypatch, heads=HEADS, **options) -> Int4KVPool:
    """Slots hold the rows of random tokens, the same for the same heads."""
    monkeypatch.setenv(env.RESOLVED, env.Options(**{"calibration": "none", **options}).to_json())
    pool = Int4KVPool(
        SIZE, page_size=PAGE, dtype=torch.uint4, head_num=heads, head_dim=DIM, layer_num=LAYERS, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    torch.manual_seed(0)
    for layer in range(LAYERS):
        k, v = torch.randn(2, SIZE + PAGE, HEADS, DIM, dtype=torch.bfloat16)[:, :, :heads]
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(torch.arange(len(k))), k, v)
    return pool


class Engine:
    """Copies what it is told to, within this process."""

    def batch_transfer_sync(self, session, sources, targets, lengths) -> int:
        for source, target, length in zip(sources, targets, lengths, strict=True):
            ctypes.memmove(target, source, length)
        return 0


def manager(pool: Int4KVPool, rank: int, size: int):
    """SGLang's sending side, with what it reads of a server."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    pointers, _, items = pool.get_contiguous_buf_infos()
    sender = MooncakeKVManager.__new__(MooncakeKVManager)
    sender.engine, sender.attn_tp_size, sender.pp_size = Engine(), size, 1
    sender.kv_args = SimpleNamespace(
        kv_data_ptrs=pointers, kv_item_lens=items, kv_layer_ids=[], page_size=PAGE, engine_rank=rank,
        total_kv_head_num=HEADS, prefill_start_layer=0,
    )  # fmt: skip
    return sender


def send(source: Int4KVPool, rank: int, size: int, target: Int4KVPool, target_rank: int, target_size: int) -> None:
    pointers, _, items = target.get_contiguous_buf_infos()
    pages, target_pages = np.array([1, 4, 5]), np.array([3, 0, 2])
    with ThreadPoolExecutor(1) as executor:
        status = manager(source, rank, size).send_kvcache_slice(
            "session", pages, pointers, target_pages, target_rank, target_size, items[0], executor
        )
    assert status == 0


def rows_of(pool: Int4KVPool, pages) -> torch.Tensor:
    slots = (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()
    return torch.stack([rows[slots] for rows in (*pool.k_buffer, *pool.v_buffer)])


def split_heads(monkeypatch) -> None:
    """Two prefill ranks to one decode rank, and one to two: whole rows, each at its head."""
    whole, empty = make_pool(monkeypatch), make_pool(monkeypatch)
    for rows in (*empty.k_buffer, *empty.v_buffer):
        rows.fill_(0xAB)
    halves = [make_pool(monkeypatch, HEADS // 2) for _ in range(2)]
    for rank, half in enumerate(halves):
        send(whole, 0, 1, half, rank, 2)
        heads = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        assert torch.equal(rows_of(half, [3, 0, 2]), rows_of(whole, [1, 4, 5])[:, :, heads])
    for half in halves:  # back to where they came from
        for rows in (*half.k_buffer, *half.v_buffer):
            pages = rows.view(-1, PAGE, *rows.shape[1:])
            pages[[1, 4, 5]] = pages[[3, 0, 2]].clone()
    for rank, half in enumerate(halves):
        send(half, rank, 2, empty, 0, 1)
    assert torch.equal(rows_of(empty, [3, 0, 2]), rows_of(whole, [1, 4, 5]))


def test_other_numbers_of_ranks(monkeypatch):
    split_heads(monkeypatch)


def test_a_transfer_that_leaves_parameters_behind_is_seen(monkeypatch):
    """As of a pool that describes its codes only."""

    def codes_only(self, session, sources, targets, lengths):
        for source, target, length in zip(sources, targets, lengths):
            for row in range(0, length, DIM // 2 + PARAM_BYTES):
                ctypes.memmove(target + row, source + row, DIM // 2)
        return 0

    monkeypatch.setattr(Engine, "batch_transfer_sync", codes_only)
    with pytest.raises(AssertionError):
        split_heads(monkeypatch)


def prefill_server(kv_layout: str, port: int):
    """SGLang's bootstrap server, where a prefill rank has registered with its pool's layout."""
    import requests
    from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

    CommonKVBootstrapServer("127.0.0.1", port)
    row = dict.fromkeys(("attn_tp_size", "attn_cp_size", "attn_dp_size", "pp_size", "system_dp_size"), 1)
    row |= dict.fromkeys(("attn_tp_rank", "attn_cp_rank", "attn_dp_rank", "pp_rank", "system_dp_rank"), 0)
    row |= {"rank_ip": "127.0.0.1", "rank_port": 1, "page_size": PAGE, "kv_cache_dtype": "int4", "kv_layout": kv_layout}
    for _ in range(100):
        try:
            requests.put(f"http://127.0.0.1:{port}/route", json=row, timeout=5).raise_for_status()
        except requests.ConnectionError:
            time.sleep(0.1)
        else:
            return


def test_servers_of_different_formats_refuse_each_other(monkeypatch):
    from sglang.srt.disaggregation import utils
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

    load_plugins()
    port = free_port()
    prefill_server(utils.get_pd_kv_layout(make_pool(monkeypatch)), port)

    def decode_server(pool) -> MooncakeKVManager:
        receiver = MooncakeKVManager.__new__(MooncakeKVManager)
        receiver.prefill_info_table, receiver.kv_args = {}, SimpleNamespace(page_size=PAGE)
        receiver.kv_cache_dtype_str, receiver.kv_layout = "int4", utils.get_pd_kv_layout(pool)
        return receiver

    for options in ({"rotation": "kv"}, {"rotation": "none"}, {"order": 32}):
        with pytest.raises(RuntimeError, match="KV layout mismatch: prefill server has kv_layout=int4-"):
            decode_server(make_pool(monkeypatch, **options)).try_ensure_parallel_info(f"127.0.0.1:{port}")
    same = decode_server(make_pool(monkeypatch))
    with pytest.raises(AttributeError):  # gets past the comparison, to what this half of a server does not have
        same.try_ensure_parallel_info(f"127.0.0.1:{port}")


def test_other_pools_are_compared_as_before():
    from sglang.srt.disaggregation import utils

    load_plugins()
    plain = MHATokenToKVPool(
        SIZE, page_size=PAGE, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM, layer_num=1, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    assert utils.get_pd_kv_layout(plain) is None
