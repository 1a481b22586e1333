"""transform_rows against the reference: the arithmetic of the format, then one rounding to the output's dtype."""

import pytest
import torch

from saw_int4 import ops, reference
from saw_int4.format import default_rotation_order, rotation_orders
from saw_int4.testing.cases import HEAD_DIMS, adversarial_rows, key_vectors
from saw_int4.testing.compare import assert_close, assert_equal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expected_rows(x, order, mean=None, mul=None, sign=None):
    def of_heads(vector):
        return vector.repeat_interleave(x.shape[1] // vector.shape[0], 0)

    t = x.float()
    if mean is not None:
        t = t - of_heads(mean)
    if mul is not None:
        t = t * of_heads(mul)
    t = reference.hadamard(t, order)
    if sign is not None:
        t = t * of_heads(sign)
    return t.to(x.dtype)


def check(engine, x, order, **vectors):
    moved = {n: v.to(engine.device) for n, v in vectors.items()}
    out = engine.transform_rows(x.to(engine.device), rotation_order=order, **moved)
    assert_equal(out, expected_rows(x, order, **vectors), "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matches_the_reference(engine, head_dim, dtype):
    x = adversarial_rows(9, 4, head_dim, dtype)
    order = default_rotation_order(head_dim)
    vectors = key_vectors(2, head_dim)
    check(engine, x, order, mean=vectors["mean"], mul=vectors["inv_scale"], sign=vectors["sign"])
    check(engine, x, order, mul=vectors["scale"])
    check(engine, x, order)


@pytest.mark.parametrize("head_dim", [64, 112])
def test_every_rotation_order(engine, head_dim):
    for order in (1, *rotation_orders(head_dim)):
        check(engine, adversarial_rows(5, 3, head_dim, torch.bfloat16), order)


def test_the_transform_changes_no_score(engine):
    """q.(k - mu) = q'.k', which is why attention may run in the transformed space."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, 2, 64, generator=g), torch.randn(6, 2, 64, generator=g)
    vectors = key_vectors(2, 64)
    on = {n: v.to(engine.device) for n, v in vectors.items()}
    q2 = engine.transform_rows(q.to(engine.device), rotation_order=64, mul=on["scale"], sign=on["sign"]).cpu()
    k2 = engine.transform_rows(
        k.to(engine.device), rotation_order=64, mean=on["mean"], mul=on["inv_scale"], sign=on["sign"]
    ).cpu()
    scores = (q.double() * (k.double() - vectors["mean"].double())).sum(-1)
    # 64 products of values up to about 30, each off by a few units of fp32.
    assert_close((q2.double() * k2.double()).sum(-1), scores, 64 * 30 * 2**-22, "scores")


def test_twice_is_the_identity(engine):
    x = torch.randn(5, 2, 128, generator=torch.Generator().manual_seed(0)).to(engine.device)
    once = engine.transform_rows(x, rotation_order=128)
    assert_close(engine.transform_rows(once, rotation_order=128), x, 2**-20, "x")


def test_in_place_and_views(engine):
    fused = torch.randn(7, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    check(engine, fused[:, 1:4], 64)
    x = fused.to(engine.device).clone()
    assert engine.transform_rows(x, rotation_order=64, out=x) is x
    assert_equal(x, expected_rows(fused, 64))


def test_no_rows(engine):
    check(engine, torch.empty(0, 2, 64, dtype=torch.bfloat16), 64)


BAD = {
    "order_3": ({"rotation_order": 3}, "rotation_order is 3"),
    "mean_of_another_shape": ({"mean": torch.zeros(3, 64)}, "divides the 4 heads"),
    "mul_of_another_width": ({"mul": torch.zeros(2, 32)}, "mul has shape"),
    "out_of_another_dtype": ({"out": torch.full((3, 4, 64), 7.0)}, "out is Float, expected BFloat16"),
    "out_not_contiguous": ({"out": torch.full((4, 3, 64), 7).bfloat16().transpose(0, 1)}, "contiguous"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(engine, name):
    changes, complaint = BAD[name]
    call = {
        "x": torch.ones(3, 4, 64, dtype=torch.bfloat16),
        "rotation_order": 64,
        "out": torch.full((3, 4, 64), 7, dtype=torch.bfloat16),
        **changes,
    }
    call = {n: v.to(engine.device) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    with pytest.raises(RuntimeError, match=complaint):
        engine.transform_rows(**call)
    assert (call["out"] == 7).all()


def test_opcheck():
    vectors = key_vectors(2, 64)
    x = torch.randn(3, 4, 64)
    torch.library.opcheck(
        torch.ops.saw_int4.transform_rows.default,
        (x, torch.empty_like(x)),
        {"rotation_order": 64, "mean": vectors["mean"], "mul": vectors["scale"], "sign": vectors["sign"]},
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_torch_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def rotate(x):
        return ops.transform_rows(x * 2, rotation_order=64) + 1

    x = torch.randn(3, 4, 64)
    assert_equal(rotate(x), ops.transform_rows(x * 2, rotation_order=64) + 1)
