"""SGLang's own ways of moving KV bytes, on INT4 rows: codes and parameters must arrive together."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from saw_int4 import env, ops
from saw_int4.format import PARAM_BYTES, row_bytes
from saw_int4.sglang_plugin.pool import Int4KVPool, locate, name_layers, pools_of

pytestmark = pytest.mark.both_versions

SIZE, LAYERS, HEADS, DIM = 96, 3, 2, 64


@pytest.fixture(params=[(1, 1), (16, 1), (32, 1), (16, 2)], ids=lambda p: f"page_{p[0]}-groups_{p[1]}")
def pool(request, monkeypatch) -> Int4KVPool:
    page_size, groups = request.param
    return make_pool(monkeypatch, page_size, groups)


def make_pool(monkeypatch, page_size: int, groups: int, heads: int = HEADS, device: str = "cpu") -> Int4KVPool:
    """A pool whose slots all hold the rows of random tokens."""
    monkeypatch.setenv(env.RESOLVED, env.Options(groups=groups).to_json())
    kv_pool = Int4KVPool(
        SIZE,
        page_size=page_size,
        dtype=torch.uint4,
        head_num=heads,
        head_dim=DIM,
        v_head_dim=DIM,
        layer_num=LAYERS,
        device=device,
        enable_memory_saver=False,
        enable_kv_cache_copy=True,
    )
    torch.manual_seed(0)
    for layer in range(LAYERS):
        k, v = torch.randn(2, SIZE + page_size, heads, DIM, dtype=torch.bfloat16).to(device)
        kv_pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(torch.arange(len(k)).to(device)), k, v)
    return kv_pool


def snapshot(pool: Int4KVPool, slots: torch.Tensor) -> torch.Tensor:
    """Bytes of the rows at some slots: [2, layers, slots, heads, row]."""
    return torch.stack([torch.stack([b[slots] for b in buffers]) for buffers in (pool.k_buffer, pool.v_buffer)])


def test_rows_are_those_of_append_kv(pool):
    """Written through SGLang's set_kv_buffer, read through its get_kv_buffer."""
    torch.manual_seed(5)
    k, v = torch.randn(2, 7, HEADS, DIM, dtype=torch.bfloat16)
    slots = torch.tensor([0, 90, 3, 41, 17, 60, 2])
    expected = [
        torch.zeros(SIZE + pool.page_size, HEADS, row_bytes(DIM, pool.format.groups), dtype=torch.uint8)
        for _ in range(2)
    ]
    ops.append_kv(k, v, *expected, slots, rotation_order=DIM)
    pool.set_kv_buffer(SimpleNamespace(layer_id=1), KVWriteLoc(slots), k, v)
    for got, want in zip(pool.get_kv_buffer(1), expected):
        assert torch.equal(got.view(torch.uint8)[slots], want[slots])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("groups", [1, 2])
def test_move_on_a_gpu(monkeypatch, groups):
    """By SGLang's Triton kernel; a token's K has 108 or 120 bytes, no multiple of the 16 that the kernel speaks of."""
    test_move(make_pool(monkeypatch, 1, groups, heads=3, device="cuda"))


def test_move(pool):
    source, target = (torch.tensor(slots, device=pool.device) for slots in ([5, 80, 33], [61, 2, 90]))
    before = snapshot(pool, torch.arange(SIZE))
    pool.move_kv_cache(target, source)
    after = snapshot(pool, torch.arange(SIZE))
    expected = before.clone()
    expected[:, :, target] = before[:, :, source]
    assert torch.equal(after, expected)


def test_a_move_that_leaves_parameters_behind_is_seen(pool, monkeypatch):
    def codes_only(self, target, source):
        for rows in (*self.k_buffer, *self.v_buffer):
            codes = rows.shape[-1] - PARAM_BYTES * self.format.groups
            rows[target, :, :codes] = rows[source, :, :codes]

    monkeypatch.setattr(Int4KVPool, "_move_kv_cache_impl", codes_only)
    with pytest.raises(AssertionError):
        test_move(pool)


def test_cpu_copy_round_trip(pool):
    slots, elsewhere = torch.tensor([4, 71, 30, 12]), torch.tensor([50, 51, 8, 95])
    before = snapshot(pool, slots)
    pool.cpu_offloading_chunk_size = 3
    copy = pool.get_cpu_copy(slots)
    for rows in (*pool.k_buffer, *pool.v_buffer):
        rows.fill_(0xAB)
    pool.load_cpu_copy(copy, elsewhere)
    assert torch.equal(snapshot(pool, elsewhere), before)


def test_a_copy_that_leaves_parameters_behind_is_seen(pool, monkeypatch):
    """As a retraction to host memory would, with scales in tensors of their own."""
    whole = pool.get_cpu_copy

    def codes_only(slots):
        copy = whole(slots)
        for layer in copy:
            for chunk in layer:
                for rows in chunk:
                    rows[..., -PARAM_BYTES:] = 0
        return copy

    monkeypatch.setattr(pool, "get_cpu_copy", codes_only)
    with pytest.raises(AssertionError):
        test_cpu_copy_round_trip(pool)


def test_transfer_descriptors_cover_whole_rows(pool):
    """What prefill/decode disaggregation registers: every byte of every page, in order."""
    pointers, lengths, items = pool.get_contiguous_buf_infos()
    buffers = [*pool.k_buffer, *pool.v_buffer]
    assert len(pointers) == len(buffers)
    for pointer, length, item, rows in zip(pointers, lengths, items, buffers):
        assert item == pool.page_size * HEADS * row_bytes(DIM, pool.format.groups)
        assert length == rows.numel()
        first_pages = bytes((ctypes.c_ubyte * (2 * item)).from_address(pointer))
        assert first_pages == rows[: 2 * pool.page_size].numpy().tobytes()


def test_sizes(pool):
    allocated = sum(pool.get_kv_size_bytes())
    assert allocated == (SIZE + pool.page_size) * pool.bytes_per_token
    assert pool.bytes_per_token == 2 * LAYERS * HEADS * row_bytes(DIM, pool.format.groups)
    assert pools_of(pool) == [pool]


def test_strangers_cannot_read_rows_as_numbers(pool):
    """A path of SGLang that does not know INT4 rows gets a dtype that it cannot compute with."""
    k = pool.get_key_buffer(0)
    assert k.dtype == torch.uint4
    with pytest.raises(RuntimeError):
        k.to(torch.bfloat16) @ torch.zeros(k.shape[-1], 1, dtype=torch.bfloat16)


@pytest.mark.parametrize("wrong", [{"v_head_dim": 32}, {"post_capture_active": True}, {"quant_method": object()}])
def test_a_pool_it_cannot_be_is_refused(pool, wrong):
    with pytest.raises(ValueError, match="int4 KV cache"):
        Int4KVPool(
            SIZE,
            page_size=1,
            dtype=torch.uint4,
            head_num=HEADS,
            head_dim=DIM,
            layer_num=1,
            device="cpu",
            enable_memory_saver=False,
            **wrong,
        )


def test_sliding_window_pool(monkeypatch):
    """Rows of a layer lie in its own part, at the slots of that part; the parts know their layers of the model."""
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    monkeypatch.setenv(env.RESOLVED, env.Options().to_json())
    kv_pool = SWAKVPool(
        size=SIZE,
        size_swa=32,
        page_size=16,
        dtype=torch.uint4,
        head_num=HEADS,
        head_dim=DIM,
        swa_attention_layer_ids=[1, 2, 4],
        full_attention_layer_ids=[0, 3],
        device="cpu",
        token_to_kv_pool_class=Int4KVPool,
    )
    name_layers(kv_pool)
    full, swa = pools_of(kv_pool)
    assert (full.layer_ids, swa.layer_ids) == ([0, 3], [1, 2, 4])
    assert locate(kv_pool, 4) == (swa, 2, True)
    assert locate(kv_pool, 3) == (full, 1, False)

    k, v = torch.randn(2, 5, HEADS, DIM, dtype=torch.bfloat16)
    slots, swa_slots = torch.tensor([60, 61, 70, 2, 9]), torch.tensor([30, 31, 3, 2, 9])
    for layer, own_slots, own in ((4, swa_slots, swa.k_buffer[2]), (3, slots, full.k_buffer[1])):
        expected = torch.zeros(2, *own.shape, dtype=torch.uint8)
        ops.append_kv(k, v, *expected, own_slots, rotation_order=DIM)
        kv_pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(slots, swa_slots), k, v)
        assert torch.equal(kv_pool.get_key_buffer(layer).view(torch.uint8), expected[0])
        assert torch.equal(own, expected[0])
