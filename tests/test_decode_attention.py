"""decode_attention against float64 attention over the dequantized cache, within the tolerance of
saw_int4.testing.compare.compare_decode.
"""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saw_int4 import ops, reference
from saw_int4.testing.cases import HEAD_DIMS, DecodeCase, make_decode
from saw_int4.testing.compare import assert_close, assert_equal, compare_decode, decode_oracle

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def run(engine, inputs):
    """(out, lse) of an engine, on the CPU. Outputs start as NaN, so that what is not written shows."""
    moved = inputs.to(engine.device)
    out = torch.full_like(moved.q, float("nan"), memory_format=torch.contiguous_format)
    lse = torch.full(moved.q.shape[:2], float("nan"), device=engine.device)
    engine.decode_attention(*moved.positional(), page_size=inputs.page_size, out=out, lse=lse, **moved.options)
    return out.cpu(), lse.cpu()


@lru_cache
def solved(case):
    """Inputs and oracle of a case, computed once for all engines. Not to be changed."""
    inputs = make_decode(case)
    return inputs, decode_oracle(inputs)


def check_case(engine, case):
    check(engine, *solved(case))


def check(engine, inputs, solution=None):
    compare_decode(*run(engine, inputs), inputs, solution or decode_oracle(inputs))


BASE = DecodeCase()
CASES = {
    **{f"head_dim_{d}": replace(BASE, head_dim=d, rotate_v=True) for d in HEAD_DIMS},
    **{f"calibrated_{d}": replace(BASE, head_dim=d, calibrated=True) for d in HEAD_DIMS},
    **{f"two_groups_{d}": replace(BASE, head_dim=d, groups=2, rotate_v=True, calibrated=True) for d in HEAD_DIMS},
    "two_groups_unrotated": replace(BASE, groups=2, rotation_order=1, num_q_heads=6),
    "two_groups_kv_heads_5": replace(BASE, groups=2, num_q_heads=10, num_kv_heads=5, head_dim=128),
    "two_groups_rows_16": replace(BASE, groups=2, head_dim=128, num_q_heads=8, q_lens=(4, 1, 3), seq_lens=(70, 4, 200)),
    "two_groups_rows_32": replace(BASE, groups=2, head_dim=128, num_q_heads=8, q_lens=(8, 1, 5), seq_lens=(70, 4, 200)),
    "two_groups_rows_27": replace(BASE, groups=2, num_q_heads=6, q_lens=(9, 1, 2), seq_lens=(109, 6, 200)),
    "two_groups_rows_of_256": replace(BASE, groups=2, head_dim=256, num_q_heads=8, q_lens=(4, 1, 3), tree=True),
    "two_groups_sharp": replace(BASE, groups=2, kv_scale=30.0, head_dim=128),
    **{f"group_{g}": replace(BASE, num_q_heads=2 * g) for g in (1, 3, 4, 7, 8, 16)},
    "mqa_20": replace(BASE, num_q_heads=20, num_kv_heads=1),
    "heads_9_3": replace(BASE, num_q_heads=9, num_kv_heads=3),
    "kv_heads_8": replace(BASE, num_q_heads=32, num_kv_heads=8, head_dim=128),
    "kv_heads_5": replace(BASE, num_q_heads=10, num_kv_heads=5, head_dim=128),
    "kv_heads_12": replace(BASE, num_q_heads=12, num_kv_heads=12),
    "float16": replace(BASE, dtype=torch.float16),
    "unrotated": replace(BASE, rotation_order=1),
    "order_16": replace(BASE, rotation_order=16, rotate_v=True),
    "order_2": replace(BASE, rotation_order=2),
    "page_16": replace(BASE, page_size=16),
    "page_64": replace(BASE, page_size=64, head_dim=128),
    "page_16_one_head": replace(BASE, page_size=16, num_kv_heads=1, head_dim=128),
    "lengths": replace(BASE, seq_lens=(0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65), q_lens=(1,) * 12),
    "empty_requests": replace(BASE, seq_lens=(0, 0), q_lens=(1, 1)),
    "no_requests": replace(BASE, seq_lens=(), q_lens=()),
    "window": replace(BASE, window=20),
    "window_0": replace(BASE, window=0, calibrated=True),
    "window_rows": replace(BASE, window=5, q_lens=(4, 1, 9)),
    # a whole tile lies before the first row, and partly outside the last row's window
    "window_rows_long": replace(BASE, window=90, seq_lens=(200, 1, 130), q_lens=(9, 1, 5)),
    "soft_cap": replace(BASE, logit_cap=5.0, calibrated=True, kv_scale=4.0),
    "sinks": replace(BASE, sink=True, calibrated=True),
    "sinks_empty": replace(BASE, sink=True, seq_lens=(0, 3), q_lens=(1, 1)),
    "rows_4": replace(BASE, q_lens=(4, 4, 4), seq_lens=(40, 4, 90)),
    "rows_16_of_a_head": replace(BASE, head_dim=128, num_q_heads=8, q_lens=(4, 1, 3), seq_lens=(70, 4, 200)),
    # four heads in a block are too much for 99 KB
    "rows_16_of_256": replace(
        BASE, head_dim=256, num_q_heads=8, num_kv_heads=4, q_lens=(5, 1, 3), seq_lens=(70, 4, 200)
    ),
    "rows_32_of_a_head": replace(BASE, head_dim=128, num_q_heads=8, q_lens=(8, 1, 5), seq_lens=(70, 4, 200)),
    # several stages of a wide pass; one head, which all warps share; references that move
    "rows_32_long": replace(BASE, head_dim=128, num_q_heads=8, q_lens=(8, 1, 5), seq_lens=(700, 4, 330)),
    # copies of 16 bytes, which a wide pass spreads over its stages
    "rows_32_four_heads": replace(
        BASE, head_dim=128, num_q_heads=16, num_kv_heads=4, q_lens=(8, 1, 5), seq_lens=(700, 4, 330)
    ),
    "rows_32_four_heads_of_64": replace(
        BASE, num_q_heads=16, num_kv_heads=4, q_lens=(8, 1, 5), seq_lens=(700, 4, 330)
    ),
    # of 16 warps, on the few SMs that the emulator pretends
    "rows_32_four_heads_alone": replace(
        BASE, head_dim=128, num_q_heads=16, num_kv_heads=4, q_lens=(8,), seq_lens=(700,)
    ),
    "rows_32_one_head": replace(BASE, num_q_heads=4, num_kv_heads=1, q_lens=(8, 1, 5), seq_lens=(1300, 4, 600)),
    "rows_32_sharp": replace(
        BASE, head_dim=128, num_q_heads=8, q_lens=(8, 1, 5), seq_lens=(300, 4, 200), kv_scale=30.0, calibrated=True
    ),
    "rows_ragged": replace(BASE, q_lens=(5, 1, 16), rotate_v=True, calibrated=True),
    "rows_none": replace(BASE, q_lens=(0, 1, 3)),
    "rows_16_group_8": replace(BASE, num_q_heads=8, num_kv_heads=1, q_lens=(16, 1, 7)),
    "tree": replace(BASE, q_lens=(6, 1, 13), tree=True),
    "tree_window": replace(BASE, q_lens=(6, 1, 13), tree=True, window=8),
    "sharp": replace(BASE, kv_scale=30.0, head_dim=128),
    "everything": replace(
        BASE, head_dim=128, q_lens=(3, 1, 8), page_size=16, window=50, logit_cap=20.0, sink=True, calibrated=True,
        rotate_v=True, num_q_heads=6, num_kv_heads=2,
    ),
}  # fmt: skip
CASES["two_groups_everything"] = replace(CASES["everything"], groups=2)


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(engine, name):
    check_case(engine, CASES[name])


@pytest.mark.parametrize("q_lens", [(1, 1, 1), (9, 2, 1)], ids=["narrow", "wide"])
def test_huge_and_tiny_queries(engine, q_lens):
    """Logits of 1e36, where one token has all the weight, and of 1e-38, where all have the same."""
    case = replace(BASE, head_dim=128, rotation_order=1, q_lens=q_lens, seq_lens=(33, 2, 70), num_q_heads=8)
    inputs = make_decode(case)
    inputs.q.zero_()
    inputs.q[:, :, 3] = torch.tensor([2.0**122, -(2.0**122), 1e36, -1e30, 1e-38, 2.0**-100, 2.0**-133, 0.0])
    expected, expected_lse = reference.decode_attention(*inputs.positional(), **inputs.options)
    compare_decode(*run(engine, inputs), inputs, (expected, expected_lse, 0.0, 0.0))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kilobytes", [99, 163])
def test_plans_of_gpus_with_less_shared_memory_match_float64(emulated, kilobytes, name):
    """Plans of sm_86, 89 and 120 (99) and sm_80 (163), run by sm_90's kernels: wide passes of 4 or 8 warps, not 16."""
    emulated.configure(shared_bytes=kilobytes * 1024)
    try:
        check_case(emulated, CASES[name])
    finally:
        emulated.configure()


@pytest.mark.large
@pytest.mark.parametrize(
    "head_dim, page_size, dtype", [(64, 1, torch.bfloat16), (128, 16, torch.float16), (256, 64, torch.bfloat16)]
)
def test_matches_float64_over_many_tokens(engine, head_dim, page_size, dtype):
    case = replace(
        BASE, head_dim=head_dim, page_size=page_size, dtype=dtype, seq_lens=(1500, 3, 700), q_lens=(2, 1, 5),
        num_q_heads=8, calibrated=True, rotate_v=True,
    )  # fmt: skip
    check_case(engine, case)


@pytest.mark.large
@pytest.mark.parametrize("head_dim", [64, 128])
def test_several_rows_of_many_requests(engine, head_dim):
    """Of a GPU's wide passes, those with two blocks per SM (tests/test_schedule.py)."""
    case = replace(
        BASE, head_dim=head_dim, num_q_heads=32, num_kv_heads=8, q_lens=(8, 5) * 20,
        seq_lens=tuple(8 + 37 * i % 250 for i in range(40)), calibrated=True,
    )  # fmt: skip
    check_case(engine, case)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float32_on_the_cpu(cpu_engine, head_dim):
    check_case(cpu_engine, replace(BASE, head_dim=head_dim, dtype=torch.float32, calibrated=True, q_lens=(3, 1, 2)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("queries", [2, 10], ids=["narrow", "wide"])
def test_damage_reaches_only_who_attends_to_it(engine, queries, groups):
    case = replace(BASE, head_dim=128, seq_lens=(40,) * 3, q_lens=(2,) * 3, num_q_heads=2 * queries, num_kv_heads=2)
    inputs = make_decode(replace(case, groups=groups))
    clean = run(engine, inputs)[0]
    slots = inputs.slot_table[inputs.table_rows[1]]
    inputs.k_cache[slots[39], 0, -4 * groups :] = (
        0xFF  # K of head 0 at the last token of request 1: its second row only
    )
    inputs.v_cache[slots[5], 1, -4 * groups :] = 0xFF  # V of head 1 at an old token: both rows
    last = inputs.slot_table[inputs.table_rows[2], 39]
    inputs.v_cache[last, 0, -4 * groups :] = 0xFF  # V of head 0 at the last token of request 2: its second row only
    out, lse = run(engine, inputs)
    out = out.view(3, 2, 2, queries, -1)  # request, row, KV head, query of its group
    assert out[1, 1, 0].isnan().all()
    assert out[1, :, 1].isnan().all()
    assert out[2, 1, 0].isnan().all()
    assert lse.view(3, 2, 2, queries)[1:, :, 1].isfinite().all()  # of V only
    out[1, 1, 0] = out[1, :, 1] = out[2, 1, 0] = 0
    expected = clean.view_as(out).clone()
    expected[1, 1, 0] = expected[1, :, 1] = expected[2, 1, 0] = 0
    assert_equal(out, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("queries", [2, 10], ids=["narrow", "wide"])
def test_a_huge_value_costs_others_no_precision(engine, queries, groups):
    """V of the last token a thousand times larger: the query row before it, which does not see it, stays as it was."""
    case = replace(BASE, head_dim=128, seq_lens=(100,), q_lens=(2,), num_q_heads=2 * queries, num_kv_heads=2)
    inputs = make_decode(replace(case, groups=groups))
    clean = run(engine, inputs)[0]
    inputs.v_cache[inputs.slot_table[inputs.table_rows[0], 99], :, -4 * groups :].view(torch.float16).mul_(1000)
    out = run(engine, inputs)[0]
    assert not torch.equal(out[1], clean[1])
    assert_close(out[0], clean[0], 2**-8 * float(clean[0].abs().max()))


def test_large_values_do_not_overflow(engine):
    inputs = make_decode(replace(BASE, kv_scale=2000.0, head_dim=128, dtype=torch.bfloat16))
    inputs.q *= 1000
    out, lse = run(engine, inputs)
    assert out.isfinite().all() and lse.isfinite().all()
    check(engine, inputs)


def test_tiny_and_zero_queries(engine):
    inputs = make_decode(BASE)
    inputs.q[0] = 0
    inputs.q[1] *= 1e-30
    check(engine, inputs)


def test_an_outlier_in_the_query_does_not_flush_the_rest(engine):
    inputs = make_decode(replace(BASE, rotation_order=1))
    inputs.q[:, :, 7] = 40
    check(engine, inputs)


def test_queries_may_be_a_view_of_fused_projections(engine):
    inputs = make_decode(BASE)
    fused = torch.randn(inputs.q.shape[0], inputs.q.shape[1] + 4, inputs.q.shape[2]).to(inputs.q.dtype)
    fused[:, :4] = inputs.q
    alone = run(engine, inputs)[0]
    inputs.q = fused[:, :4]
    assert_equal(run(engine, inputs)[0], alone)


def test_same_bits_every_time(engine):
    inputs = make_decode(replace(BASE, q_lens=(3, 1, 8), rotate_v=True))
    first = run(engine, inputs)
    for _ in range(2):
        again = run(engine, inputs)
        assert_equal(again[0], first[0])
        assert_equal(again[1], first[1])


@pytest.mark.parametrize("heads", [2, 8])
def test_same_bits_whatever_shares_the_batch(engine, heads):
    lens = (600, 1, 333)
    together = make_decode(replace(BASE, seq_lens=lens, q_lens=(1, 1, 1), num_q_heads=2 * heads, num_kv_heads=heads))
    together.options["batch_invariant"] = True
    all_rows = run(engine, together)[0]
    for b in range(3):
        alone = replace_requests(together, [b])
        assert_equal(run(engine, alone)[0], all_rows[b : b + 1])


# rows_32: blocks of 16 warps with four heads, which no other launch has
@pytest.mark.parametrize(
    "name",
    ["lengths", "rows_ragged", "rows_16_group_8", "window_rows_long", "everything", "rows_32_four_heads",
     "rows_32_four_heads_of_64"],
)  # fmt: skip
def test_batch_invariant_launches_match_float64(engine, name):
    inputs, solution = solved(CASES[name])
    check(engine, replace(inputs, options=inputs.options | {"batch_invariant": True}), solution)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])  # merged by a second launch, and by the last block of a run
def test_a_captured_graph_replays_with_other_lengths(kv_heads, batch_invariant):
    """One capture serves lengths from 0 to the width of the table, each replay equal to an eager call, bit for bit."""
    heads = dict(num_q_heads=4 * kv_heads, num_kv_heads=kv_heads)
    case = replace(BASE, **heads, head_dim=128, seq_lens=(1500,) * 5, q_lens=(1,) * 5, rotate_v=True, sink=True)
    inputs = make_decode(case).to(torch.device("cuda"))
    options = inputs.options | {"batch_invariant": batch_invariant}
    out, lse = torch.empty_like(inputs.q), torch.empty(inputs.q.shape[:2], device="cuda")

    def call(out, lse):
        ops.decode_attention(*inputs.positional(), out=out, lse=lse, workspace=workspace, **options)

    workspace = ops.decode_workspace(inputs.q.device, *inputs.q.shape, batch_invariant=batch_invariant)
    call(out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out, lse)
    for lens in [(1500, 3, 700, 0, 64), (1, 1, 1, 1, 1), (0, 0, 0, 0, 1400), (1500,) * 5, (33, 1100, 257, 1, 999)]:
        inputs.seq_lens.copy_(torch.tensor(lens))
        inputs.q.normal_()
        out.fill_(float("nan"))
        graph.replay()
        replayed, replayed_lse = out.cpu(), lse.cpu()
        call(out, lse)
        assert_equal(replayed, out.cpu(), f"out at lengths {lens}")
        assert_equal(replayed_lse, lse.cpu(), f"lse at lengths {lens}")
        on_cpu = inputs.to(torch.device("cpu"))
        compare_decode(replayed, replayed_lse, on_cpu, decode_oracle(on_cpu))


def replace_requests(inputs, keep):
    picked = replace(inputs)
    picked.q, picked.table_rows, picked.seq_lens = inputs.q[keep], inputs.table_rows[keep], inputs.seq_lens[keep]
    return picked


def test_cache_past_two_gigabytes(engine):
    """Rows past byte 2^31 of the cache. Only a few pages of the allocation are ever touched."""
    inputs = make_decode(replace(BASE, head_dim=128, num_kv_heads=2))
    num_slots = 2**31 // (2 * 68) + 1000
    shift = num_slots - inputs.k_cache.shape[0]
    expected = run(engine, inputs)[0]
    for name in ("k_cache", "v_cache"):
        small = getattr(inputs, name)
        big = torch.empty(num_slots, *small.shape[1:], dtype=torch.uint8)
        big[shift:] = small
        setattr(inputs, name, big)
    inputs.slot_table = torch.where(inputs.slot_table < 2**31 - 1, inputs.slot_table + shift, inputs.slot_table)
    assert_equal(run(engine, inputs)[0], expected)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(engine, data):
    most = 40 if engine.name == "emulated" else 300
    requests = data.draw(st.integers(1, 4))
    lens = data.draw(st.tuples(*[st.integers(1, most)] * requests))
    q_lens = tuple(data.draw(st.integers(1, min(n, 9))) for n in lens)
    head_dim = data.draw(st.sampled_from(HEAD_DIMS))
    kv_heads = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    order = data.draw(st.sampled_from([1, 2, 8, 16]))
    case = DecodeCase(
        head_dim=head_dim,
        num_q_heads=kv_heads * data.draw(st.integers(1, 5)),
        num_kv_heads=kv_heads,
        seq_lens=lens,
        q_lens=q_lens,
        page_size=data.draw(st.sampled_from([1, 4, 16])),
        dtype=data.draw(st.sampled_from(SIXTEEN_BIT)),
        rotation_order=order,
        rotate_v=order > 1 and data.draw(st.booleans()),
        calibrated=data.draw(st.booleans()),
        window=data.draw(st.sampled_from([-1, 0, 7, 100])),
        logit_cap=data.draw(st.sampled_from([0.0, 3.0])),
        sink=data.draw(st.booleans()),
        tree=data.draw(st.booleans()),
        groups=data.draw(st.integers(1, 2)),
        seed=data.draw(st.integers(0, 1000)),
    )
    check_case(engine, case)


BAD = {
    "q has no rows of 16 channels": (lambda i: setattr(i, "q", i.q[..., :40]), "head_dim 40"),
    "heads do not divide": (lambda i: setattr(i, "q", i.q[:, :3]), "heads"),
    "cache of another head_dim": (lambda i: setattr(i, "k_cache", i.k_cache[..., :-8]), "k_cache"),
    "slot table of int64": (lambda i: setattr(i, "slot_table", i.slot_table.long()), "slot_table"),
    "lengths of int32": (lambda i: setattr(i, "seq_lens", i.seq_lens.int()), "seq_lens"),
    "too few query rows": (lambda i: setattr(i, "q", i.q[:2]), "rows"),
    "order does not divide": (lambda i: i.options.update(rotation_order=128), "rotation"),
    "negative soft cap": (lambda i: i.options.update(logit_cap=-1.0), "logit_cap"),
    "half a calibration": (lambda i: i.options.update(k_mean=torch.zeros(2, 64)), "k_scale"),
    "sinks of another shape": (lambda i: i.options.update(sinks=torch.zeros(3)), "sinks"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(engine, name):
    spoil, complaint = BAD[name]
    inputs = make_decode(BASE)
    spoil(inputs)
    moved = inputs.to(engine.device)
    out = torch.full_like(moved.q, 7.0, memory_format=torch.contiguous_format)
    with pytest.raises(RuntimeError, match=complaint):
        engine.decode_attention(*moved.positional(), out=out, **moved.options)
    assert (out == 7).all()


@pytest.mark.parametrize("problem", ["slot past the end", "length past the table"])
def test_bad_values_are_refused_on_the_cpu(problem):
    inputs = make_decode(BASE)
    if problem == "slot past the end":
        inputs.slot_table[inputs.table_rows[0], 3] = inputs.k_cache.shape[0]
    else:
        inputs.seq_lens[0] = inputs.slot_table.shape[1] + 1
    with pytest.raises(RuntimeError, match="expected"):
        ops.decode_attention(*inputs.positional(), **inputs.options)


def test_opcheck():
    inputs = make_decode(replace(BASE, calibrated=True))
    out, lse = torch.empty_like(inputs.q), torch.empty(inputs.q.shape[:2])
    torch.library.opcheck(
        torch.ops.saw_int4.decode_attention.default,
        (*inputs.positional(), out, lse, None),
        {"page_size": 1, **inputs.options},
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_torch_compile():
    inputs = make_decode(BASE)

    @torch.compile(fullgraph=True)
    def twice(q):
        return ops.decode_attention(q, *inputs.positional()[1:], **inputs.options) * 2

    assert_equal(twice(inputs.q), ops.decode_attention(*inputs.positional(), **inputs.options) * 2)
