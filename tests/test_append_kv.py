"""append_kv, byte for byte against the reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saw_int4 import ops, reference
from saw_int4.format import default_rotation_order, rotation_orders, row_bytes
from saw_int4.testing.cases import HEAD_DIMS, adversarial_rows, key_vectors
from saw_int4.testing.compare import assert_equal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def k_options(heads, head_dim):
    vectors = key_vectors(heads, head_dim)
    return {f"k_{name}": vectors[name] for name in ("mean", "inv_scale", "sign")}


def empty_caches(num_slots, heads, head_dim, groups=1):
    """K and V caches of bytes that no row has, so that every byte written shows."""
    return [torch.full((num_slots, heads, row_bytes(head_dim, groups)), 0xA5, dtype=torch.uint8) for _ in range(2)]


def check(engine, k, v, slots, num_slots, groups=1, **options):
    expected = empty_caches(num_slots, k.shape[1], k.shape[2], groups)
    reference.append_kv(k, v, *expected, slots, **options)
    actual = [cache.to(engine.device) for cache in empty_caches(num_slots, k.shape[1], k.shape[2], groups)]
    moved = {n: x.to(engine.device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    # .to() keeps strides: what is a view stays one.
    engine.append_kv(k.to(engine.device), v.to(engine.device), *actual, slots.to(engine.device), **moved)
    assert_equal(actual[0], expected[0], "k_cache")
    assert_equal(actual[1], expected[1], "v_cache")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matches_the_reference(engine, head_dim, dtype):
    k, v = adversarial_rows(17, 2, head_dim, dtype), adversarial_rows(17, 2, head_dim, dtype, seed=1)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:17]
    order = default_rotation_order(head_dim)
    for groups in (1, 2):
        check(engine, k, v, slots, 40, groups, rotation_order=order, rotate_v=True, **k_options(2, head_dim))
    check(engine, k, v, slots, 40, rotation_order=order)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_every_rotation_order(engine, head_dim):
    k, v = adversarial_rows(13, 1, head_dim, torch.bfloat16), adversarial_rows(13, 1, head_dim, torch.bfloat16, 1)
    for order in (1, *rotation_orders(head_dim)):
        check(engine, k, v, torch.arange(13), 13, rotation_order=order, rotate_v=order > 1)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 144, 320])
def test_any_multiple_of_16_on_the_cpu(cpu_engine, head_dim):
    k, v = adversarial_rows(19, 3, head_dim, torch.bfloat16), adversarial_rows(19, 3, head_dim, torch.bfloat16, 1)
    order = default_rotation_order(head_dim)
    check(cpu_engine, k, v, torch.arange(19), 19, rotation_order=order, rotate_v=True, **k_options(3, head_dim))


@pytest.mark.parametrize("heads", [1, 5, 8])
def test_many_tokens(engine, heads):
    g = torch.Generator().manual_seed(heads)
    k = (torch.randn(700, heads, 128, generator=g) * 3).bfloat16()
    v = torch.randn(700, heads, 128, generator=g).bfloat16()
    slots = torch.randperm(1000, generator=g)[:700]
    check(engine, k, v, slots, 1000, rotation_order=128, **k_options(heads, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "order"), [(8, 64), (8, 16), (5, 1), (1, 64)])
def test_many_rows_of_head_dim_64(engine, heads, order, dtype):
    """A GPU gives each a lane from 384 rows of K and V per SM on; the emulator has 4 SMs."""
    sms = torch.cuda.get_device_properties(engine.device).multi_processor_count if engine.name == "cuda" else 4
    tokens = 200 * sms // heads + 100
    k, v = (adversarial_rows(tokens, heads, 64, dtype, seed) for seed in range(2))
    slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(0))[:tokens]
    slots[::7] = -1
    for groups in (1, 2):
        check(engine, k, v, slots, tokens + 9, groups, rotation_order=order, rotate_v=True, **k_options(heads, 64))
        check(engine, k, v, slots, tokens + 9, groups, rotation_order=order)


def test_rounding_ties_and_ends_of_the_range(engine):
    """Values half-way between codes, and parameters at the ends of fp16: subnormal scale, largest offset."""
    head_dim = 64
    steps = torch.arange(head_dim).float()
    rows = torch.stack([
        steps % 16,
        (steps % 31) / 2,
        (steps % 32) * (3967 / 31 / 256),  # units that fall on and beside the ends of a step
        torch.where(steps == 63, 3967.0, (steps % 8) * 64 + 0.5),  # a unit is 1: ties, and shifts that cost alike
        (steps % 16) * 2**-24,  # the smallest scale that fp16 holds
        (steps % 16) * 2**-26,  # rounds to a scale of zero
        65504 - steps % 16,
        -65504 + (steps % 2) * 131008,  # a spread that overflows nothing
        -65536 + steps % 3,  # an offset that overflows
        steps * 1e37 - 3e38,  # a spread that overflows fp32
        1000 + (steps % 16) * 2**-20,  # an offset much coarser than the scale
        torch.where(steps == 5, 1e-3, 0.0),
    ]).unsqueeze(1)  # fmt: skip
    check(engine, rows, rows.flip(0), torch.arange(len(rows)), len(rows), rotation_order=1)


@pytest.mark.parametrize("low", [1000.24, 1000.26, 1000.02, 999.98, -1000.24, -1000.26])
def test_rows_far_from_zero(engine, low):
    """fp16 rounds the offset by a step of the codes or several, down or up."""
    row = low + torch.linspace(0, 1, 64).expand(3, 2, 64)
    check(engine, row, row, torch.arange(3), 3, rotation_order=1)


def test_negative_slots_are_skipped(engine):
    k, v = adversarial_rows(9, 2, 64, torch.bfloat16), adversarial_rows(9, 2, 64, torch.bfloat16, 1)
    slots = torch.tensor([3, -1, 0, -5, 7, 11, -(2**62), 2, 1])
    check(engine, k, v, slots, 12, rotation_order=64)


def test_no_tokens(engine):
    k = torch.empty(0, 2, 64, dtype=torch.bfloat16)
    check(engine, k, k, torch.empty(0, dtype=torch.int64), 4, rotation_order=64)


def test_equal_slots_keep_whole_rows(engine):
    """Padding tokens share a slot: every other slot is right, and on a CPU the shared one holds a whole row."""
    k = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    slots = torch.where(torch.arange(40) % 2 == 0, 0, torch.arange(40))
    actual = [cache.to(engine.device) for cache in empty_caches(40, 2, 64)]
    engine.append_kv(k.to(engine.device), k.to(engine.device), *actual, slots.to(engine.device), rotation_order=64)
    rows = reference.quantize_rows(reference.transform_keys(k, 64))
    assert_equal(actual[0].cpu()[1::2], rows[1::2])
    for head in range(2 if engine.name.startswith("cpu") else 0):  # a GPU's blocks may mix the words of several
        assert (actual[0].cpu()[0, head] == rows[::2, head]).all(-1).any()


def test_views_of_a_fused_projection(engine):
    fused = torch.randn(11, 4 + 2 + 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, v = fused[:, 4:6], fused[:, 6:8]
    assert not k.is_contiguous()
    check(engine, k, v, torch.arange(11).flip(0), 11, rotation_order=64, **k_options(2, 64))
    one_head = fused[:, 4:5]
    check(engine, one_head, fused[:, 7:8], torch.arange(11), 11, rotation_order=64)


def test_cache_past_two_gigabytes(engine):
    """Slots past byte 2^31. Only the pages of a few rows of the allocation are ever touched."""
    num_slots = 2**31 // (2 * row_bytes(128)) + 50
    k = torch.randn(3, 2, 128, generator=torch.Generator().manual_seed(0)).bfloat16().to(engine.device)
    slots = torch.tensor([num_slots - 1, 5, num_slots - 40])
    caches = [torch.empty(num_slots, 2, row_bytes(128), dtype=torch.uint8, device=engine.device) for _ in range(2)]
    engine.append_kv(k, k, *caches, slots.to(engine.device), rotation_order=128)
    rows = reference.quantize_rows(reference.transform_keys(k.cpu(), 128))
    assert_equal(caches[0][slots.to(engine.device)], rows)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(engine, data):
    head_dim, heads = data.draw(st.sampled_from(HEAD_DIMS)), data.draw(st.integers(1, 4))
    tokens, dtype = data.draw(st.integers(0, 20)), data.draw(st.sampled_from(DTYPES))
    order = data.draw(st.sampled_from([1, *rotation_orders(head_dim)]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    spread = 10.0 ** data.draw(st.integers(-9, 6))
    shift = data.draw(st.sampled_from([0.0, 3.0, -1e4]))
    k, v = ((torch.randn(tokens, heads, head_dim, generator=g) * spread + shift).to(dtype) for _ in range(2))
    slots = torch.randperm(tokens + 5, generator=g)[:tokens]
    options = k_options(heads, head_dim) if data.draw(st.booleans()) else {}
    rotate_v = order > 1 and data.draw(st.booleans())
    groups = data.draw(st.integers(1, 2))
    check(engine, k, v, slots, tokens + 5, groups, rotation_order=order, rotate_v=rotate_v, **options)


GOOD = dict(
    k=torch.ones(3, 2, 64, dtype=torch.bfloat16),
    v=torch.ones(3, 2, 64, dtype=torch.bfloat16),
    k_cache=torch.full((8, 2, 36), 7, dtype=torch.uint8),
    v_cache=torch.full((8, 2, 36), 7, dtype=torch.uint8),
    slots=torch.arange(3),
    rotation_order=64,
)
BAD = {
    "v_of_another_shape": ({"v": torch.ones(3, 1, 64, dtype=torch.bfloat16)}, r"v has shape \[3, 1, 64\]"),
    "v_of_another_dtype": ({"v": torch.ones(3, 2, 64)}, "v is Float, expected BFloat16"),
    "float64": ({"k": torch.ones(3, 2, 64).double()}, "k is Double, expected bfloat16, float16 or float32"),
    "head_dim_72": ({"k": torch.ones(3, 2, 72).bfloat16()}, "head_dim 72, expected a positive multiple of 16"),
    "two_dimensions": ({"k": torch.ones(3, 128).bfloat16()}, r"expected three dimensions \[T, H, D\]"),
    "strided_channels": ({"k": torch.ones(3, 64, 2).bfloat16().transpose(1, 2)}, "last two dimensions contiguous"),
    "cache_of_another_head_dim": ({"k_cache": torch.full((8, 2, 68), 7, dtype=torch.uint8)}, "another head_dim"),
    "cache_of_other_heads": ({"k_cache": torch.full((8, 3, 36), 7, dtype=torch.uint8)}, "k_cache has shape"),
    "cache_of_int8": ({"v_cache": torch.full((8, 2, 36), 7, dtype=torch.int8)}, "v_cache is Char, expected Byte"),
    "caches_differ": ({"v_cache": torch.full((9, 2, 36), 7, dtype=torch.uint8)}, "v_cache has shape"),
    "slots_of_int32": ({"slots": torch.arange(3).int()}, "slots is Int, expected Long"),
    "too_few_slots": ({"slots": torch.arange(2)}, r"slots has shape \[2\]"),
    "order_3": ({"rotation_order": 3}, "rotation_order is 3, expected 1 .* or a power of two"),
    "order_0": ({"rotation_order": 0}, "rotation_order is 0"),
    "order_past_head_dim": ({"rotation_order": 128}, "divides head_dim 64"),
    "half_a_calibration": ({"k_mean": torch.zeros(2, 64)}, "k_inv_scale .* missing"),
    "calibration_of_another_shape": (
        {"k_mean": torch.zeros(64), "k_inv_scale": torch.ones(2, 64), "k_sign": torch.ones(2, 64)},
        "k_mean has shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(engine, name):
    changes, complaint = BAD[name]
    call = {n: x.to(engine.device) if isinstance(x, torch.Tensor) else x for n, x in {**GOOD, **changes}.items()}
    with pytest.raises(RuntimeError, match=complaint):
        engine.append_kv(**call)
    assert (call["k_cache"] == 7).all() and (call["v_cache"] == 7).all()


def test_a_slot_past_the_end_is_refused_on_the_cpu(cpu_engine):
    call = {**GOOD, "slots": torch.tensor([0, 8, 1])}
    with pytest.raises(RuntimeError, match=r"slots\[1\] is 8, expected less than the 8 slots"):
        cpu_engine.append_kv(**call)
    assert (call["k_cache"] == 7).all() and (call["v_cache"] == 7).all()


def test_opcheck():
    args = tuple(GOOD[n].clone() for n in ("k", "v", "k_cache", "v_cache", "slots"))
    torch.library.opcheck(
        torch.ops.saw_int4.append_kv.default,
        args,
        {"rotation_order": 64, "rotate_v": False, **k_options(2, 64)},
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_torch_compile():
    caches = [GOOD[n].clone() for n in ("k_cache", "v_cache")]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(k, v):
        ops.append_kv(k * 2, v, *caches, GOOD["slots"], rotation_order=64)
        return k + 1

    k = adversarial_rows(3, 2, 64, torch.bfloat16)
    step(k, k)
    expected = [GOOD[n].clone() for n in ("k_cache", "v_cache")]
    ops.append_kv(k * 2, k, *expected, GOOD["slots"], rotation_order=64)
    assert_equal(caches[0], expected[0])
    assert_equal(caches[1], expected[1])
