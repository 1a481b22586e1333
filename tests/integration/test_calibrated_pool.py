"""A calibration artifact reaches the rows: its vectors, this rank's heads, and refusals of a wrong artifact."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from saw_int4 import env, ops
from saw_int4.calibration import artifact
from saw_int4.calibration.fit import KeyTransform as Fitted
from saw_int4.format import row_bytes
from saw_int4.sglang_plugin import pool as pool_module
from saw_int4.sglang_plugin.pool import Int4KVPool
from saw_int4.sglang_plugin.quant_method import Int4KVMethod

pytestmark = pytest.mark.both_versions

LAYERS, TOTAL_HEADS, DIM, SIZE = 3, 4, 64, 32


@pytest.fixture
def calibration(tmp_path):
    g = torch.Generator().manual_seed(0)
    shape = (TOTAL_HEADS, DIM)

    def fitted() -> Fitted:
        sign = torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)
        return Fitted(torch.randn(shape, generator=g), torch.exp(torch.randn(shape, generator=g)), sign)

    made = artifact.build({i: fitted() for i in range(LAYERS)}, model="m", rotation_order=DIM, rotate_v=True)
    artifact.save(made, tmp_path / "a.safetensors")
    return made, tmp_path / "a.safetensors"


def pool_of(
    monkeypatch, path, rank=0, size=1, heads=TOTAL_HEADS, first_layer=0, memory_saver=False, **options
) -> Int4KVPool:
    monkeypatch.setenv(env.RESOLVED, env.Options(calibration=str(path), **options).to_json())
    parallel = SimpleNamespace(attn_tp_rank=rank, attn_tp_size=size)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: parallel)
    return pool_module.Int4KVPool(
        SIZE,
        page_size=1,
        dtype=torch.uint4,
        head_num=heads,
        head_dim=DIM,
        v_head_dim=DIM,
        layer_num=LAYERS - first_layer,
        start_layer=first_layer,
        device="cpu",
        enable_memory_saver=memory_saver,
        enable_kv_cache_copy=True,
    )


@pytest.mark.parametrize(("rank", "size", "stage"), [(0, 1, 0), (0, 2, 0), (1, 2, 1), (3, 4, 0), (5, 8, 2)])
def test_rows_are_calibrated_ones_of_this_rank(calibration, monkeypatch, rank, size, stage):
    """Its heads, and the layers of its pipeline stage, which begins at layer ``stage``."""
    made, path = calibration
    heads = max(1, TOTAL_HEADS // size)
    pool = pool_of(monkeypatch, path, rank, size, heads, stage)
    assert pool.format.calibration == made.fingerprint
    k, v = torch.randn(2, 5, heads, DIM, dtype=torch.bfloat16)
    slots = torch.tensor([3, 9, 1, 30, 7])
    pool.set_kv_buffer(SimpleNamespace(layer_id=2), KVWriteLoc(slots), k, v)
    first = rank * TOTAL_HEADS // size
    mean, scale, sign = (x[first : first + heads].contiguous() for x in made.layers[2])
    want = [torch.zeros(SIZE + 1, heads, row_bytes(DIM), dtype=torch.uint8) for _ in range(2)]
    ops.append_kv(
        k, v, *want, slots, rotation_order=DIM, k_mean=mean, k_inv_scale=1 / scale, k_sign=sign, rotate_v=True
    )
    for got, expected in zip(pool.get_kv_buffer(2), want):
        assert torch.equal(got.view(torch.uint8)[slots], expected[slots])


def test_memory_saver(calibration, monkeypatch):
    """--enable-memory-saver gives back rows and nothing else: what memory comes again, whatever it holds, serves."""
    regions = []

    class Saver(TorchMemorySaverAdapter):
        """Knows which allocations it may take away."""

        @contextmanager
        def region(self, tag, enable_cpu_backup=False):
            regions.append(tag)
            yield
            regions.pop()

    def allocate(method, *args):
        assert regions == [GPU_MEMORY_TYPE_KV_CACHE]
        return create_buffers(method, *args)

    create_buffers = Int4KVMethod.create_buffers
    monkeypatch.setattr(Int4KVMethod, "create_buffers", allocate)
    monkeypatch.setattr(TorchMemorySaverAdapter, "create", staticmethod(lambda enable: Saver()))
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 8, DIM), torch.randn(2, 5, TOTAL_HEADS, DIM, dtype=torch.bfloat16)
    slots = torch.tensor([3, 9, 1, 30, 7])
    pool = pool_of(monkeypatch, calibration[1], memory_saver=True)
    answers = []
    for _ in range(2):
        pool.set_kv_buffer(SimpleNamespace(layer_id=2), KVWriteLoc(slots), k, v)
        transform = pool.transforms[2]
        options = dict(k_mean=transform.mean, k_scale=transform.scale, k_sign=transform.sign, rotate_v=True)
        table = torch.tensor([[*slots.tolist(), 0, 0]], dtype=torch.int32)
        request = table, torch.tensor([0]), torch.tensor([5])
        answers.append(ops.decode_attention(q, *pool.rows(2), *request, sm_scale=0.1, rotation_order=DIM, **options))
        for rows in (*pool.k_buffer, *pool.v_buffer):
            rows.fill_(0xFF)  # NaN where parameters are
    assert torch.equal(*answers) and answers[0].isfinite().all()


def test_formats_of_other_artifacts_differ(calibration, monkeypatch):
    made, path = calibration
    with_it = pool_of(monkeypatch, path).format
    without = pool_of(monkeypatch, "none").format
    assert with_it.fingerprint != without.fingerprint
    assert made.fingerprint in with_it.describe()
    assert with_it.rotate_v and not without.rotate_v  # the artifact says that it pays
    assert not pool_of(monkeypatch, path, rotation="k").format.rotate_v


def test_wrong_artifacts_are_refused(calibration, monkeypatch, tmp_path):
    _, path = calibration
    with pytest.raises(ValueError, match="rotation_order is 64, the server has 16"):
        pool_of(monkeypatch, path, order=16)
    with pytest.raises(ValueError, match="rotation_order is 64, the server has 1"):
        pool_of(monkeypatch, path, rotation="none")
    with pytest.raises(ValueError, match="groups is 1, the server has 2"):
        pool_of(monkeypatch, path, groups=2)
    with pytest.raises(ValueError, match="cannot be read"):
        pool_of(monkeypatch, tmp_path / "missing")
    pool = pool_of(monkeypatch, path, heads=2)
    with pytest.raises(ValueError, match=r"vectors are \(4, 64\), the KV pool has 2"):
        pool.transforms  # noqa: B018
